"""Stages that take their real recipes and log what real training logs, without a model: for the tests of pages. An SFT
or DPO makes `num_train_epochs` × 20 steps, each as long as it takes to be stopped between two; what the recipe's seed
says decides how it ends."""

import sys
import time
from functools import partial
from typing import Any

from practice import KINDS as PRACTICE

from jobs import worker
from jobs.worker import Kind
from katherine import recipe
from katherine.errors import DataError
from katherine.progress import Progress, Stopped
from katherine.runs import Run
from katherine.settings import Home

SECONDS = 0.02
FAILS = 13  # the seed of a run that finds fault with its data at its third step


def train(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    asked = run.record.recipe
    kept = run.out / "kept"
    first = int(kept.read_text()) if kept.exists() else 0
    of = asked["num_train_epochs"] * 20
    progress.phase("train")
    progress.say("\x1b[1mloading\x1b[0m <b>a base</b>")
    for step in range(first + 1, of + 1):
        if progress.stop_requested():
            raise Stopped
        if asked["seed"] == FAILS and step == 3:
            raise DataError("talk.jsonl, line 3: <b>no</b> messages. Mend the line.")
        time.sleep(SECONDS)
        kept.write_text(str(step))
        row = {"step": step, "loss": 4 / step, "learning_rate": asked["learning_rate"], "grad_norm": 0.5}
        if run.record.kind == "dpo":
            row |= {"margin": 0.1 * step, "accuracy": 0.5, "reward_chosen": 0.1, "reward_rejected": -0.1}
        progress.metric(**row, tokens_per_second=1000.0, memory_gib=1.5, seconds=step * SECONDS)
        progress.step(step, of)
    return {"steps": of, "first_loss": 4.0, "last_loss": 4 / of, "seconds": of * SECONDS}


def make(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    progress.phase("make")
    return {}


def _complete(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return recipe.load(kind, values).model_dump(mode="json")


KINDS = {
    kind: Kind(train if kind in ("sft", "dpo") else make, partial(_complete, kind), (), worker.KINDS[kind].obstacles)
    for kind in ("sft", "dpo", "export", "probe")
} | {"steps": PRACTICE["steps"]}

if __name__ == "__main__":
    sys.exit(worker.main(KINDS))
