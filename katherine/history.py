"""All runs at a glance, cheaply: each file is read again only when it changed, so that a page can ask every two
seconds with hundreds of past runs. What a run is belongs to runs; starting and stopping to `jobs`."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from katherine import runs
from katherine.errors import DataError, NotFound
from katherine.runs import Run, State, Status
from katherine.settings import Home


@dataclass(frozen=True, slots=True)
class Seen:
    """A run and its status when last looked at. `damage` says what is wrong with its status.json, else ""; such a
    run counts as failed."""

    run: Run
    status: Status
    damage: str = ""

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def kind(self) -> str:
        return self.run.record.kind


class History:
    """The runs of a home. Safe to ask from several threads."""

    def __init__(self, home: Home):
        self._home = home
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[tuple[int, int, int], Seen]] = {}

    def runs(self) -> list[Seen]:
        """Every run, newest first. Folders without a readable run.json are left out."""
        with self._lock:
            here: dict[str, tuple[tuple[int, int, int], Seen]] = {}
            try:
                names = [name for name in os.listdir(self._home.runs) if not name.startswith(".")]
            except FileNotFoundError:
                names = []
            for name in names:
                if looked := self._look(name):
                    here[name] = looked
            self._seen = here
            return sorted((seen for _, seen in here.values()), key=_age, reverse=True)

    def get(self, run_id: str) -> Seen:
        """One run. Raises NotFound for an id that is not a run's, DataError for a damaged run.json."""
        with self._lock:
            looked = self._look(run_id)
        if looked is None:
            runs.load(self._home, run_id)  # says what is wrong
            raise NotFound(f"There is no run {run_id!r} in {self._home.runs}.")
        return looked[1]

    def under_way(self) -> list[Seen]:
        """Runs that have not ended, oldest first."""
        return [seen for seen in reversed(self.runs()) if seen.status.state not in runs.ENDED]

    def _look(self, name: str) -> tuple[tuple[int, int, int], Seen] | None:
        known = self._seen.get(name)
        mark = _mark(self._home.runs / name / "status.json")
        if known and known[0] == mark:
            return known
        try:
            run = known[1].run if known else runs.load(self._home, name)
        except (NotFound, DataError):
            return None
        try:
            seen = Seen(run, run.status())
        except DataError as error:
            seen = Seen(run, Status(State.failed, reason=str(error)), damage=str(error))
        return mark, seen


def _age(seen: Seen) -> tuple[str, str]:
    return seen.run.record.created, seen.id


def _mark(path: Path) -> tuple[int, int, int]:
    """Changes when the file does: it is always replaced, never written in place."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
