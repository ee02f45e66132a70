"""Kinds of run that take milliseconds and end in every way a real one can, for the tests of jobs. A module like
jobs.worker: the tests set jobs.queue.WORKER to its name."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from jobs import worker
from jobs.worker import Kind
from katherine.errors import DataError
from katherine.progress import Progress, Stopped
from katherine.runs import Run
from katherine.settings import Home


def steps(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    """Counts to `of`, keeps every step it made, and goes on from the last kept."""
    recipe = run.record.recipe
    kept = run.out / "kept"
    first = int(kept.read_text()) if kept.exists() else 0
    progress.phase("count")
    (run.out / "gpus").write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} of {sys.argv[sys.argv.index('--gpus') + 1 :]}")
    of = recipe["of"]
    for step in range(first + 1, of + 1):
        if progress.stop_requested():
            raise Stopped
        time.sleep(recipe.get("seconds", 0))
        # Whole or not at all, since the tests kill at any moment.
        kept.with_name(".kept").write_text(str(step))
        kept.with_name(".kept").replace(kept)
        progress.metric(step=step, loss=0.0)
        progress.step(step, of)
    return {"first": first + 1, "last": of}


def fail(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    class OutOfMemoryError(RuntimeError):
        """Named as torch names its own."""

    how = run.record.recipe["how"]
    if how == "data":
        raise DataError("talk.jsonl, line 3: no messages. Mend the line.")
    if how == "gpu memory":
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "disk":
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/volume/checkpoint-50")
        except OSError as error:
            raise RuntimeError("could not save") from error
    if how == "exit":
        os._exit(7)
    if how == "abort":
        os.abort()
    if how == "crash after the result":
        (run.path / "result.json").write_text(json.dumps({"kept": True}))
        progress.tell(end="succeeded")  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGSEGV)
    raise ZeroDivisionError("division by zero")


def chatter(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    for percent in range(0, 101, 10):
        print(f"\r{percent}%", end="", flush=True)
        time.sleep(0.005)
    print()
    for number in range(run.record.recipe["lines"]):
        progress.say(f"line {number} " + "x" * 90)
    print("no end of line", end="")
    return {}


def child(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    """Starts two processes that would outlive it, one of them in a session of its own, then counts."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    pids = [subprocess.Popen(sleeping, start_new_session=own).pid for own in (False, True)]
    (run.out / "pids").write_text(json.dumps(pids))
    return steps(home, run, progress)


def stubborn(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    progress.step(1, 2)
    time.sleep(60)
    return {}


def eat(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    """Eats memory until something stops it; the test puts a limit around it first."""
    progress.phase("eat")
    while not (run.out / "go").exists():
        time.sleep(0.01)
    hoard = []
    while True:
        hoard.append(bytearray(b"x" * 1_000_000))


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    return {"of": 3} | values


KINDS = {work.__name__: Kind(work, _complete) for work in (steps, fail, chatter, child, stubborn, eat)}
# What a pipeline is made of.
KINDS |= {stage: Kind(steps, _complete) for stage in ("sft", "dpo", "export", "probe")}
KINDS["spread"] = Kind(steps, _complete, spreads=lambda home, recipe: recipe.get("spreads", True))
KINDS["trusted"] = Kind(steps, _complete, ("HF_TOKEN",))

if __name__ == "__main__":
    sys.exit(worker.main(KINDS))
