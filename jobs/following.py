"""A worker's hold of the processes that follow it, each on a GPU of its own (see katherine.ranks): it starts them, they
end with it, and it learns why one failed. What they do is follower's."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from katherine import ranks
from katherine.ranks import Rank
from katherine.runs import Run

# When one has failed, the worker mostly fails too and says so itself; where it hangs instead, waiting for the lost one,
# it is ended after that many seconds.
GRACE = 10.0
# For the others to close their GPU's context once the training is done.
LEAVING = 30.0
_REMEDY = "Resume it: it goes on from its newest checkpoint."


class Followers:
    """Those of a run, started with this. module: the worker's; gpus: all of the run's, the worker's own first. lost:
    called with (reason, remedy) from another thread when one has failed and the worker has not noticed."""

    def __init__(self, run: Run, module: str, gpus: Sequence[str], lost: Callable[[str, str], None]):
        self._lost = lost
        self._over = threading.Event()
        self._failed = threading.Event()
        self._why = ("", "")
        # On this machine's own disk: by a network volume's locks they would not find each other.
        self._folder = tempfile.TemporaryDirectory(prefix="katherine-ranks-")
        meeting = f"{self._folder.name}/meeting"
        ranks.enter(Rank(0, len(gpus), meeting))
        self._threads = []
        for index, name in enumerate(gpus[1:], start=1):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jobs.follower", str(run.path), "--worker", module, "--gpu", name),
                    *("--rank", str(index), "--of", str(len(gpus)), "--meeting", meeting),
                    *("--leader", str(os.getpid())),
                ],
                # In the worker's group, so that what ends the worker ends them.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            thread = threading.Thread(target=self._watch, args=(process, name), name=f"gpu-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def why(self, patience: float = GRACE) -> tuple[str, str] | None:
        """(reason, remedy) of one that has failed, or fails within that many seconds."""
        return self._why if self._failed.wait(patience) else None

    def close(self) -> None:
        """The worker is done: so should they be. Those that hang are left to end with it."""
        self._over.set()
        for thread in self._threads:
            thread.join(LEAVING)
        self._folder.cleanup()
        ranks.enter(ranks.ALONE)

    def _watch(self, process: subprocess.Popen, name: str) -> None:
        assert process.stdout is not None
        said = process.stdout.read()
        if process.wait() == 0 or self._failed.is_set():
            return
        reason, remedy = f"The process on GPU {name} left with exit code {process.returncode}.", _REMEDY
        if process.returncode < 0:
            reason = f"The process on GPU {name} was ended ({signal.Signals(-process.returncode).name})."
        if process.returncode == -signal.SIGKILL:
            remedy = f"{_REMEDY} If it happens again, the machine has too little memory for so many GPUs at once."
        with suppress(ValueError):
            told = json.loads(said)
            reason, remedy = f"{told['reason']} (GPU {name})", told["remedy"]
        self._why = (reason, remedy)
        self._failed.set()
        if not self._over.wait(GRACE):
            self._lost(reason, remedy)
