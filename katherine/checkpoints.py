"""Checkpoints of a training run: whole or absent, verified before anything is resumed from them. What is in one is
the business of training."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from katherine.errors import TrainingError
from katherine.progress import Progress
from katherine.runs import write_json

# The newest checkpoint may be damaged (a machine that died, a network volume): the one before it is the way out.
KEEP = 2
_MANIFEST = "manifest.json"


class Checkpoints:
    """A folder of checkpoint-<step> folders. Each is filled under a hidden name, gets its manifest (the sha256 of
    every file) last, and is then renamed: under its own name it is whole."""

    def __init__(self, folder: Path, keep: int, fingerprint: str, progress: Progress):
        self.folder = folder
        self.keep = keep
        self.fingerprint = fingerprint
        self.progress = progress

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first."""
        found = (path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*"))
        return sorted(int(step) for step in found if step.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to fill; it appears as checkpoint-<step> when the block ends without an error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".checkpoint-{step}-", dir=self.folder))
        try:
            yield draft
            files = {path.name: _describe(path) for path in sorted(draft.iterdir())}
            write_json(draft / _MANIFEST, {"step": step, "fingerprint": self.fingerprint, "files": files})
            sync(draft)
            if self.path(step).exists():
                self._remove(step)
            draft.rename(self.path(step))
            sync(self.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def newest(self, tidy: bool = True) -> Path | None:
        """The newest sound checkpoint, or None. Unsound ones are named in the log and, with `tidy`, removed: not by
        each of several processes, of which one may see a hiccup of the volume that the others do not.

        Raises TrainingError where a sound one belongs to another recipe or dataset.
        """
        for draft in self.folder.glob(".checkpoint-*") if tidy else ():
            shutil.rmtree(draft, ignore_errors=True)
        for step in reversed(self.steps()):
            if fault := self._fault(step):
                self.progress.say(f"{self.path(step)} is not sound ({fault}): trying an older one.")
                if tidy:
                    self._remove(step)
                continue
            found = json.loads((self.path(step) / _MANIFEST).read_text())["fingerprint"]
            if found != self.fingerprint:
                raise TrainingError(
                    f"{self.path(step)} belongs to another recipe, dataset or parent. Start a new run instead of "
                    "resuming this one."
                )
            return self.path(step)
        return None

    def _fault(self, step: int) -> str:
        """Why a checkpoint cannot be resumed from; empty where it can."""
        folder = self.path(step)
        try:
            files = json.loads((folder / _MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError):
            return "its manifest is missing or damaged"
        for name, expected in files.items():
            try:
                if _describe(folder / name) != expected:
                    return f"{name} has changed since it was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return ""

    def _remove(self, step: int) -> None:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under its name.
        doomed = self.folder / f".checkpoint-{step}-{time.monotonic_ns()}"
        self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as data:
        return {"sha256": hashlib.file_digest(data, "sha256").hexdigest(), "bytes": path.stat().st_size}


def sync(folder: Path) -> None:
    """Flushes a folder and its files to disk."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
