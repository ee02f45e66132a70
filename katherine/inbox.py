"""The inbox: files that came in and wait to become a dataset. They come from the page, from the hub, or by any other
way into KATHERINE_HOME/inbox. Reading them is corpus's."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from katherine.errors import DiskError, NotFound
from katherine.settings import Home

JSONL = ".jsonl"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file in the inbox. name: its path below the inbox; bytes that are not UTF-8 are written as backslash escapes.
    size: bytes. modified: ISO 8601, UTC. readable: whether its name says JSONL; one that does not is listed so that
    nobody looks for it in vain."""

    path: Path
    name: str
    size: int
    modified: str

    @property
    def readable(self) -> bool:
        return self.path.name.lower().endswith(JSONL)


@dataclass(frozen=True, slots=True)
class Received:
    """kept: names in the inbox. refused: a sentence for each file that was not taken."""

    kept: list[str]
    refused: list[str]


def files(home: Home) -> list[Waiting]:
    """Every file in the inbox, the folder that was filled last first. What begins with a dot is somebody's unfinished
    work and is left out."""
    found: list[Waiting] = []
    newest: dict[str, str] = {}
    for place, folders, names in os.walk(home.inbox):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            with suppress(OSError):  # taken away just now, or a link to nowhere
                seen = path.stat()
                if not name.startswith(".") and path.is_file():
                    modified = datetime.fromtimestamp(seen.st_mtime, UTC).isoformat(timespec="seconds")
                    shown = os.fsencode(path.relative_to(home.inbox)).decode(errors="backslashreplace")
                    found.append(Waiting(path, shown, seen.st_size, modified))
                    newest[_group(shown)] = max(newest.get(_group(shown), ""), modified)
    found.sort(key=lambda file: file.name)
    return sorted(found, key=lambda file: (newest[_group(file.name)], _group(file.name)), reverse=True)


def _group(name: str) -> str:
    """The folder that came as one: an upload, a place on the hub; "" for files that lie in the inbox itself."""
    return name.partition("/")[0] if "/" in name else ""


def find(home: Home, names: Sequence[str]) -> list[Path]:
    """The files of these names, in their order. Raises NotFound naming those that are gone."""
    there = {file.name: file.path for file in files(home)}
    if gone := [name for name in names if name not in there]:
        raise NotFound(f"No longer in the inbox: {', '.join(gone)}. Choose again.")
    return [there[name] for name in names]


def receive(home: Home, uploads: Sequence[Path]) -> Received:
    """Moves uploaded files into a folder of their own in the inbox. What is not JSONL by its name is removed, and
    named. Raises DiskError where one cannot be kept; the others stay."""
    folder = home.inbox / f"uploads-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"
    kept: list[str] = []
    refused: list[str] = []
    for upload in uploads:
        name = upload.name
        if not name.lower().endswith(JSONL):
            why = (
                "put one object a line and name it .jsonl" if name.lower().endswith(".json") else "only .jsonl is read"
            )
            refused.append(f"{name} was not taken: {why}.")
            upload.unlink(missing_ok=True)
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A hidden name until it is whole: the inbox may lie on another disk, and then this is a copy.
            part = folder / f".{len(kept)}.part"
            shutil.move(upload, part)
            place = _free(folder / name)
            part.rename(place)
        except OSError as error:
            raise DiskError(f"{name} could not be kept in {folder}: {error}. Those before it were.") from error
        kept.append(place.relative_to(home.inbox).as_posix())
    return Received(kept, refused)


def _free(path: Path) -> Path:
    """The path, or one beside it with a number where a file of that name is there already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def remove(home: Home, names: Sequence[str]) -> None:
    """Deletes files of the inbox; datasets keep copies of their own. Raises NotFound or DiskError."""
    for path in find(home, names):
        try:
            path.unlink(missing_ok=True)
            # An emptied folder goes with its last file.
            for parent in path.parents:
                if parent == home.inbox:
                    break
                parent.rmdir()
        except OSError as error:
            if path.exists():
                raise DiskError(f"{path} could not be deleted: {error}.") from error
