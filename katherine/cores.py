"""The processor cores that are ours, and how threads wait for one another where these are few."""

import contextlib
import math
import os
from pathlib import Path

# A thread that spins for its neighbour keeps it from running as soon as anything else wants a core. Measured on two
# cores beside one busy process: the small base answered 2 to 10 tokens/s instead of 40, and trained at less than a
# twentieth of its pace instead of a half. Shorter spins cost more alone than they save: at 100 an answer loses a sixth,
# a training a quarter; at 500 neither can be told from the default. With many cores, waking sleepers at each of a
# token's thousand barriers could cost more than it saves, so those spin as usual.
FEW = 4
SPINS = "500"


def count() -> int:
    """Cores this process may really use. A container's quota shows in its cgroup only: the machine under it has
    many more, and as many threads would wait for each other."""
    allowed = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


def waiting() -> dict[str, str]:
    """What GNU's OpenMP, of torch and llama.cpp alike, is told by the environment. It reads it when it is loaded."""
    return {"GOMP_SPINCOUNT": SPINS} if count() <= FEW else {}
