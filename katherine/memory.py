"""Memory that is free at this moment, of this machine or of the container around it. What a model needs is for its
loader to say."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from katherine import gpu
from katherine.doctor import cgroup_memory
from katherine.errors import SetupError


def host(mapped_by: Sequence[int] = ()) -> int:
    """Bytes of main memory that could still be taken. The kernel counts the pages of mapped files as free; for the
    processes `mapped_by` they are not, since they compute with them."""
    import psutil

    free = psutil.virtual_memory().available - sum(_mapped(pid) for pid in mapped_by)
    limit, used = cgroup_memory()
    return max(0, free if limit is None else min(free, limit - used))


def cards() -> int | None:
    """Bytes free on all NVIDIA cards together; None where there is none, or its driver does not say."""
    try:
        known = [
            card.memory_total - card.memory_used
            for card in gpu.read()
            if card.memory_total is not None and card.memory_used is not None
        ]
    except SetupError:
        return None
    return sum(known) if known else None


def resident(pid: int) -> int:
    """Bytes of main memory that the process holds now; 0 where it is gone."""
    return _status(pid, "VmRSS:")


def _mapped(pid: int) -> int:
    return _status(pid, "RssFile:")


def _status(pid: int, field: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
