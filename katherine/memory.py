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


def card(name: str) -> int | None:
    """Bytes free on the GPU of that name; None where there is none, or its driver does not say."""
    try:
        found = gpu.of(name)
    except SetupError:
        return None
    if found is None or found.memory_total is None or found.memory_used is None:
        return None
    return found.memory_total - found.memory_used


def resident(pid: int) -> int:
    """Bytes of main memory that the process holds now; 0 where it is gone."""
    return _status(pid, "VmRSS:")


def peak(pid: int) -> int:
    """The most bytes of main memory that the process has held at once; 0 where it is gone. (Its own ru_maxrss would
    begin at its parent's.)"""
    return _status(pid, "VmHWM:")


def _mapped(pid: int) -> int:
    return _status(pid, "RssFile:")


def _status(pid: int, field: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
