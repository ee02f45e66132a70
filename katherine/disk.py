"""The disk under a path: which mount holds it, whether that outlives a stop of the container, and the room on it. What
needs how much room is for others to say."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

NETWORK_FILE_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "beegfs", "virtiofs", "glusterfs")
# A container's own layers, and memory.
_WIPED = ("overlay", "aufs", "fuse.fuse-overlayfs", "tmpfs", "ramfs")
# A checkpoint of the 9B's adapter and its optimiser is below 2 GB and there are two at once; under this much, the next
# one may not fit.
NEARLY_FULL = 10 * 10**9


@dataclass(frozen=True, slots=True)
class Mount:
    """point: where it is mounted. kind: as the kernel names it, such as "ext4" or "fuse.mfs". device: "major:minor"."""

    point: Path
    kind: str
    device: str

    @property
    def on_network(self) -> bool:
        return self.kind.startswith(NETWORK_FILE_SYSTEMS)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes on the file system that holds a folder. quota_known: false on a network file system, whose figures are of
    the whole cluster and not of what was rented."""

    free: int
    total: int
    quota_known: bool

    @property
    def nearly_full(self) -> bool:
        return self.free < NEARLY_FULL


def mounts(table: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """Every mount of this container, in the order in which they were made."""
    found = []
    for line in table.read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        point = Path(fields[4].encode().decode("unicode_escape"))  # a space is written \040
        found.append(Mount(point, after.split()[0], fields[2]))
    return found


def mount(path: Path, table: list[Mount] | None = None) -> Mount:
    """The mount that holds `path`, which need not be there yet."""
    path = path.resolve()
    holding = Mount(Path("/"), "unknown", "")
    for one in mounts() if table is None else table:
        # A later mount on the same point hides the earlier one.
        if path.is_relative_to(one.point) and len(one.point.parts) >= len(holding.point.parts):
            holding = one
    return holding


def outlives_a_stop(path: Path, table: list[Mount] | None = None) -> bool:
    """Whether what lies at `path` is still there after the container was stopped and started: true on a volume, false
    on the container's own disk, which is wiped. KATHERINE_VOLUME names a folder that does, where the mounts do not show
    it."""
    told = os.environ.get("KATHERINE_VOLUME", "").strip()
    if told and path.resolve().is_relative_to(Path(told).resolve()):
        return True
    table = mounts() if table is None else table
    holding, root = mount(path, table), mount(Path("/"), table)
    return holding.point != root.point and holding.device != root.device and holding.kind not in _WIPED


def room(path: Path) -> Room:
    """The room for `path`, which need not be there yet. Raises OSError where its disk does not answer."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return Room(usage.free, usage.total, not mount(there).on_network)


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether it says that there is no room left, on the disk or in a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
