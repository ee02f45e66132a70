"""SFT as jobs.worker has it, with a mishap in one of its processes: the run's out/mishap says which. Without one every
step takes so long that a test can come between two."""

import sys
import time
from typing import Any

from jobs import worker
from jobs.worker import KINDS as REAL
from katherine import ranks
from katherine.errors import DataError
from katherine.progress import Progress
from katherine.runs import Run
from katherine.settings import Home

MISHAP = "mishap"


def sft(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    import torch

    from katherine import sft as stage
    from katherine import steps

    mishap = (run.out / MISHAP).read_text() if (run.out / MISHAP).exists() else "slow"
    real, calls = steps.PackedSft.losses, 0

    def losses(self: Any, model: Any, batch: Any, whole: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(self, model, batch, whole)
        if mishap == "slow":
            time.sleep(0.05)
        if mishap == "no memory" and calls == 3 and not ranks.mine().leads:
            # What it leaves behind must be gone.
            loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    steps.PackedSft.losses = losses  # type: ignore[method-assign]
    if mishap == "other examples" and not ranks.mine().leads:
        sft_unit = stage.unit
        stage.unit = lambda row: tuple((ids[::-1], learned) for ids, learned in sft_unit(row))
    if mishap == "follower fails" and not ranks.mine().leads:
        raise DataError("talk.jsonl, line 3: no messages. Mend the line.")
    if mishap == "follower hangs the leader" and not ranks.mine().leads:
        time.sleep(1)
        raise DataError("talk.jsonl, line 4: no messages. Mend the line.")
    return REAL["sft"].work(home, run, progress)


KINDS = {"sft": worker.Kind(sft, REAL["sft"].complete, spreads=lambda home, recipe: True)}

if __name__ == "__main__":
    sys.exit(worker.main(KINDS))
