"""All runs at a glance, cheaply: each file is read again only when it changed, so that a page can ask every two
seconds with hundreds of past runs. What a run is belongs to runs; starting and stopping to `jobs`."""

import os
import threading
from dataclasses import dataclass

from katherine import outcomes, runs
from katherine.errors import DataError, NotFound
from katherine.outcomes import Outcome
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
        self._root = os.fspath(home.runs)
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[tuple[int, int, int], Seen]] = {}
        self._sorted: list[Seen] = []
        self._outcomes: dict[str, tuple[Seen, Outcome]] = {}

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
            if here != self._seen:
                self._seen = here
                self._sorted = sorted((seen for _, seen in here.values()), key=_age, reverse=True)
                for gone in self._outcomes.keys() - here.keys():
                    self._outcomes.pop(gone, None)
            return list(self._sorted)

    def get(self, run_id: str) -> Seen:
        """One run. Raises NotFound for an id that is not a run's, DataError for a damaged run.json."""
        with self._lock:
            looked = self._look(run_id)
        if looked is None:
            runs.load(self._home, run_id)  # says what is wrong
            raise NotFound(f"There is no run {run_id!r} in {self._home.runs}.")
        return looked[1]

    def outcome(self, seen: Seen) -> Outcome:
        """What came of the run. Read again only when its status changed: a result is written before a run succeeds."""
        with self._lock:
            known = self._outcomes.get(seen.id)
        if known and known[0] is seen:
            return known[1]
        found = outcomes.read(seen.run, seen.status)
        with self._lock:
            self._outcomes[seen.id] = seen, found
        return found

    def children(self, run_id: str) -> list[Seen]:
        """The runs that build directly on this one, oldest first."""
        return [seen for seen in reversed(self.runs()) if seen.run.record.parent == run_id]

    def under_way(self) -> list[Seen]:
        """Runs that have not ended, oldest first."""
        return [seen for seen in reversed(self.runs()) if seen.status.state not in runs.ENDED]

    def _look(self, name: str) -> tuple[tuple[int, int, int], Seen] | None:
        known = self._seen.get(name)
        # Text put together, not a Path or a join: five hundred of those cost more than asking the disk does.
        now = mark(f"{self._root}/{name}/status.json")
        if known and known[0] == now:
            return known
        try:
            run = known[1].run if known else runs.load(self._home, name)
        except (NotFound, DataError):
            return None
        try:
            seen = Seen(run, run.status())
        except DataError as error:
            seen = Seen(run, Status(State.failed, reason=str(error)), damage=str(error))
        return now, seen


def _age(seen: Seen) -> tuple[str, str]:
    return seen.run.record.created, seen.id


def mark(path: str) -> tuple[int, int, int]:
    """Changes when a status file does: it is always replaced, never written in place. Zeros where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
