"""A process that follows a run's worker on another GPU: it does what the worker does, and says and keeps nothing but
why it failed. Started by jobs.following."""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

from jobs import queue, worker
from katherine import gpu, ranks, runs
from katherine.progress import Quiet, Stopped
from katherine.ranks import Rank
from katherine.settings import Home


class Following(Quiet):
    """A Progress that says and keeps nothing: the leader does."""

    def phase(self, name: str) -> None:
        pass

    def metric(self, **values: float | int | str | None) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def main() -> int:
    """Follow the worker of the run named on the command line. Returns the exit code: 0 where the work went to its end
    or was stopped."""
    arguments = argparse.ArgumentParser(description="Train along with a run's worker; started by it.")
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--worker", required=True, help="module that says what kinds of run do")
    arguments.add_argument("--gpu", required=True)
    arguments.add_argument("--rank", type=int, required=True)
    arguments.add_argument("--of", type=int, required=True)
    arguments.add_argument("--meeting", required=True, help="file by which the processes find each other")
    arguments.add_argument("--leader", type=int, required=True, help="the worker's pid")
    asked = arguments.parse_args()
    worker.die_with(asked.leader)
    # The worker reads its end from there; what libraries print goes to the log.
    telling = os.dup(1)
    os.dup2(2, 1)
    os.environ |= gpu.alone(asked.gpu)
    ranks.enter(Rank(asked.rank, asked.of, asked.meeting))
    home = Home(asked.run.parent.parent)
    run = runs.load(home, asked.run.name)
    try:
        queue.worker_module(asked.worker).KINDS[run.record.kind].work(home, run, Following())
    except Stopped:
        return 0
    except Exception as error:
        traceback.print_exc()
        reason, remedy = worker.explain(error, run)
        os.write(telling, json.dumps({"reason": reason[:2000], "remedy": remedy}).encode())
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without taking CUDA and NCCL down in order, which may wait for a process that waits for us, or crash.
    os._exit(code)
