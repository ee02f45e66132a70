"""Large files that live for one run only, kept in memory where there is ample: which folder of /dev/shm a run has, and
what a dead one left there. What lies in it is the run's business."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from katherine import memory

SHARED_MEMORY = Path("/dev/shm")
_NAME = "katherine-scratch-"


@contextmanager
def in_memory(name: str) -> Iterator[Path | None]:
    """A folder in memory called after `name`, gone with all in it at the end; None where the machine has none. What
    dead processes left is removed first: a kill keeps nobody's promise."""
    sweep()
    folder = SHARED_MEMORY / (_NAME + name)
    try:
        folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        # Held for as long as this process lives: so a stranger can tell that somebody still does.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def is_ample(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes may be put into a folder in memory: its file system has the room, and of the memory that
    this container could still take, as much again is left for those who work on the files."""
    try:
        return shutil.disk_usage(folder).free >= needed and memory.host() >= 2 * needed
    except OSError:
        return False


def sweep() -> None:
    """Removes what runs that are dead left in memory. Never raises."""
    for folder in SHARED_MEMORY.glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
