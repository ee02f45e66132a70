"""What is asked of runs: start, stop, resume, wait. The queue is the run folders themselves; every change of a run
that no supervisor is carrying out happens here, under one mutex. Carrying runs out is the supervisor's."""

import hashlib
import importlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs import detached, slot
from katherine import pod, runs
from katherine.errors import KatherineError, NotFound
from katherine.history import mark
from katherine.runs import ENDED, Run, State, Status
from katherine.settings import Home

# The module whose KINDS say what each kind of run does. It is code's to choose: a run.json names only a kind.
WORKER = "jobs.worker"
# Every process of a run carries this variable, with the run's folder as its value: so those that outlive the worker
# are found, and no others.
MARK = "KATHERINE_RUN"
# On another machine only the heartbeat tells; the supervisor writes one every 5 s, and twelve missed are no hiccup
# of a network volume.
SILENCE = 60.0
# status.json of a run that has ended → what its file looked like then.
_ended: dict[str, tuple[int, int, int]] = {}


def submit(
    home: Home,
    kind: str,
    *,
    recipe: dict[str, Any],
    who: str,
    parent: str | None = None,
    dataset: str | None = None,
    inputs: dict[str, str] | None = None,
    start: bool = True,
) -> Run:
    """Queue a run, and unless `start` is false see that a supervisor drains the queue. While an equal request (kind,
    parent, dataset, recipe) is unfinished, its run is returned instead: a double click starts once.

    The recipe is frozen with its defaults filled in, so that the run does not change with them, and the dataset's
    fingerprint with it, so that a changed dataset is noticed. Raises RecipeError, or NotFound for the kind, the
    parent or the dataset.
    """
    recipe = complete(kind, recipe)
    files = worker_module(WORKER).KINDS[kind].frozen(home, recipe)
    inputs = dict(inputs or {}) | _fingerprints(home, dataset)
    if parent is not None:
        runs.load(home, parent)
    with slot.mutex(home):
        _mark_interrupted(home)
        run = _found_or_made(
            home, kind, recipe=recipe, who=who, parent=parent, dataset=dataset, inputs=inputs, files=files
        )
        if start:
            _wake(home)
    return run


def submit_chain(
    home: Home, stages: dict[str, dict[str, Any]], *, who: str, dataset: str | None, parent: str | None = None
) -> list[Run]:
    """Queue runs of which each is the next one's parent, the first on `parent`, and see that they are carried out:
    kind → recipe, in order. Asked for again while they are unfinished, by however many at once, they are the same
    runs. Raises as submit does, before anything is queued."""
    asked = {kind: complete(kind, recipe) for kind, recipe in stages.items()}
    kinds = worker_module(WORKER).KINDS
    frozen = {kind: kinds[kind].frozen(home, recipe) for kind, recipe in asked.items()}
    inputs = _fingerprints(home, dataset)
    if parent is not None:
        runs.load(home, parent)
    queued: list[Run] = []
    # All under one mutex: the first cannot end, or the next begin, before the last knows whose child it is.
    with slot.mutex(home):
        _mark_interrupted(home)
        for kind, recipe in asked.items():
            above = queued[-1].id if queued else parent
            made = _found_or_made(
                home, kind, recipe=recipe, who=who, parent=above, dataset=dataset, inputs=inputs, files=frozen[kind]
            )
            queued.append(made)
        _wake(home)
    return queued


def _found_or_made(
    home: Home,
    kind: str,
    *,
    recipe: dict[str, Any],
    who: str,
    parent: str | None,
    dataset: str | None,
    inputs: dict[str, str],
    files: dict[str, str],
) -> Run:
    """The unfinished run of an equal request, unless it has been asked to stop, or a new one. files: texts that it is
    to keep, which make the request another where they differ."""
    kept = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    for run, _ in unfinished(home):
        record = run.record
        if control(run).exists() or any(record.inputs.get(name) != digest for name, digest in kept.items()):
            continue
        if (record.kind, record.parent, record.dataset, record.recipe) == (kind, parent, dataset, recipe):
            return run
    return runs.create(
        home, kind, recipe=recipe, who=who, parent=parent, dataset=dataset, inputs=inputs | kept, files=files
    )


def _fingerprints(home: Home, dataset: str | None) -> dict[str, str]:
    """What a run remembers of its dataset's content. Raises NotFound for a dataset that is not there."""
    if dataset is None:
        return {}
    if not (home.datasets / dataset).is_dir():
        raise NotFound(f"There is no dataset {dataset!r} in {home.datasets}. `python app.py prepare` makes one.")
    found = fingerprint(home.datasets / dataset)
    return {"dataset": found} if found else {}


def complete(kind: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values as JSON keeps them, with its defaults filled in. Raises NotFound for an unknown kind, and
    RecipeError for values that cannot work."""
    kinds = worker_module(WORKER).KINDS
    if kind not in kinds:
        raise NotFound(f"There is no kind of run {kind!r}; the kinds are {', '.join(kinds)}.")
    return json.loads(json.dumps(kinds[kind].complete(recipe)))


def fingerprint(dataset: Path) -> str | None:
    """The fingerprint of a dataset folder's content, as its report says; None without a readable report."""
    # The summary says the same in a few kB, where a report may name a million problems. Older datasets have none.
    for name in ("summary.json", "report.json"):
        with suppress(OSError, ValueError, AttributeError):
            return json.loads((dataset / name).read_bytes()).get("fingerprint")
    return None


def stop(home: Home, run_id: str, kill: bool = False) -> Status:
    """Ask a run to stop, and return its status as it is then. A queued run is cancelled at once, with those queued
    behind it. One under way keeps its work at the next step's end and then stops; with `kill` its processes are
    ended within seconds, and what its last checkpoint lacks is lost. An ended run is left alone."""
    run = runs.load(home, run_id)
    with slot.mutex(home):
        _mark_interrupted(home)
        status = run.status()
        if status.state is State.queued:
            status = _cancel(run, f"Stopped by you before it {'went on' if status.attempt else 'began'}.")
            _settle(home)
        elif status.state not in ENDED:
            request = control(run)
            if kill or not request.exists():
                # The worker looks only whether the file is there, the supervisor also at what it says.
                draft = request.with_name(".stop")
                draft.write_text("kill" if kill else "keep")
                draft.replace(request)
            # Who stops a run does not want what builds on it, even if the stop comes after its last step.
            for child, below in unfinished(home):
                if child.record.parent == run_id and below.state is State.queued:
                    _cancel(child, f"Stopped by you, with run {run_id}, which it builds on.")
            _settle(home)
    return status


def resume(home: Home, run_id: str) -> Run:
    """Queue an ended run again, in its own folder: it goes on from its newest sound checkpoint. One that is queued or
    under way is returned as it is. Raises KatherineError for a run that succeeded, or whose parent did not."""
    run = runs.load(home, run_id)
    with slot.mutex(home):
        _mark_interrupted(home)
        status = run.status()
        if status.state is State.succeeded:
            raise KatherineError(f"Run {run.id} has succeeded: there is nothing to resume. Start a new run instead.")
        if status.state in ENDED:
            parent = _parent_state(home, run)
            if parent in (State.failed, State.cancelled):
                raise KatherineError(
                    f"Run {run.id} builds on run {run.record.parent}, which was {parent}. Resume that one first."
                )
            control(run).unlink(missing_ok=True)
            run.set_status(state=State.queued, phase="", reason="", remedy="", ended=None, exit_code=None)
        _wake(home)
    return run


def reconcile(home: Home) -> list[Run]:
    """Make what the files say true again: a run whose supervisor is gone becomes interrupted, and the queue is
    drained on. Call it at start and every few seconds; it is cheap. Returns the runs it marked interrupted."""
    with slot.mutex(home):
        found = _mark_interrupted(home)
        _wake(home)
    return found


def wait(home: Home, run_id: str, timeout: float | None = None) -> Status:
    """The run's status once it has ended, or cannot begin because its parent was interrupted, or after `timeout`
    seconds, whichever comes first. Reconciles meanwhile."""
    run = runs.load(home, run_id)
    begun = reconciled = time.monotonic()
    while True:
        status = run.status()
        moment = time.monotonic()
        if status.state in ENDED or (timeout is not None and moment - begun >= timeout):
            return status
        if status.state is State.queued and blocked(home, run):
            return status
        # A second: the wait for a dead supervisor, against a reading of every run's status.
        if moment - reconciled >= 1:
            reconcile(home)
            reconciled = moment
        time.sleep(0.05)


def wake(home: Home) -> None:
    """See that a supervisor is running if there is work for one."""
    with slot.mutex(home):
        _wake(home)


def control(run: Run) -> Path:
    """The file by which a run under way is asked to stop; it says "keep" or "kill"."""
    return run.path / "stop"


def unfinished(home: Home) -> list[tuple[Run, Status]]:
    """Runs that have not ended, with their status, oldest first. Damaged folders are left out."""
    if not home.runs.is_dir():
        return []
    found = []
    root = os.fspath(home.runs)
    for name in os.listdir(root):
        # Nearly all have ended, hundreds, and it is asked every few seconds: of those the file is looked at alone.
        with suppress(OSError, ValueError, TypeError, KeyError, KatherineError):
            path = os.path.join(root, name, "status.json")
            # Before it is read: what is written meanwhile is then read the next time.
            now = mark(path)
            if _ended.get(path) == now:
                continue
            if json.loads(Path(path).read_bytes())["state"] in ENDED:
                _ended[path] = now
                continue
            run = runs.load(home, name)
            found.append((run, run.status()))
    return sorted(found, key=lambda pair: (pair[0].record.created, pair[0].id))


def next_runnable(home: Home) -> Run | None:
    """The oldest queued run whose parent, if it has one, succeeded. Queued runs whose parent failed or was stopped
    are cancelled on the way; behind an interrupted parent they stay, to go on when it is resumed. Call it under the
    mutex."""
    _settle(home)
    return next(waiting(home), None)


def waiting(home: Home) -> Iterator[Run]:
    """The queued runs that could begin now, had each a GPU, oldest first."""
    for run, status in unfinished(home):
        if status.state is State.queued and _parent_state(home, run) in (None, State.succeeded):
            yield run


def worker_module(name: str) -> ModuleType:
    return importlib.import_module(name)


def ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is gone, or dead and not yet waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, the command's name in parentheses, may itself hold spaces and parentheses. See proc(5).
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def machine() -> str:
    """This boot of this machine or container: where a pid means anything."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def marked(run: Run) -> str:
    """The value of MARK in the run's processes: the folder by its one true name."""
    return os.path.realpath(run.path)


def end_leftovers(run: Run, patience: float = 0.0) -> None:
    """Kill whatever processes of the run are still there, wherever they have put themselves, and wait up to `patience`
    seconds for their end: the memory of a GPU comes back with it."""
    mark = f"{MARK}={marked(run)}".encode(errors="surrogateescape")
    deadline = time.monotonic() + patience
    while True:
        found = False
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with suppress(OSError):
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        os.kill(int(process.name), signal.SIGKILL)
                        found = True
        if not found or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _is_supervised(status: Status) -> bool:
    if status.machine != machine():
        heard = datetime.fromisoformat(status.heartbeat) if status.heartbeat else datetime.min.replace(tzinfo=UTC)
        return abs((datetime.now(UTC) - heard).total_seconds()) < SILENCE
    return status.supervisor is not None and ticks(status.supervisor) == status.supervisor_started


def _mark_interrupted(home: Home) -> list[Run]:
    found = []
    for run, status in unfinished(home):
        if status.state is State.queued or _is_supervised(status):
            continue
        # Its supervisor may have written the end after we read and before we looked for it; now it writes no more.
        status = run.status()
        if status.state in ENDED:
            continue
        if status.machine == machine():
            end_leftovers(run)
        _interrupt(run, "The machine went away or the process was killed.")
        found.append(run)
    return found


def give_up(home: Home, run: Run, why: str) -> None:
    """For a supervisor that can no longer watch a run of its own: its processes are ended, and it can be resumed."""
    with slot.mutex(home):
        end_leftovers(run)
        if run.status().state not in ENDED:
            _interrupt(run, why)


def _interrupt(run: Run, why: str) -> None:
    remedy = "Resume it: it goes on from its newest checkpoint."
    run.set_status(**ended(State.interrupted), reason=why, remedy=remedy)


def ended(state: State) -> dict[str, Any]:
    """What every end has in common, as changes to a Status."""
    nobody = {"pid": None, "pid_started": None, "supervisor": None, "supervisor_started": None, "machine": None}
    return {"state": state, "ended": runs.now(), **nobody}


def _cancel(run: Run, reason: str, remedy: str = "Resume it to queue it again.") -> Status:
    return run.set_status(**ended(State.cancelled), phase="", reason=reason, remedy=remedy)


def _settle(home: Home) -> None:
    """Cancel queued runs whose parent will never give them anything, and their own children in turn."""
    changed = True
    while changed:
        changed = False
        for run, status in unfinished(home):
            parent = _parent_state(home, run)
            if status.state is State.queued and parent in (State.failed, State.cancelled):
                name = run.record.parent
                _cancel(run, f"Run {name}, which it builds on, was {parent}.", f"Resume {name}, then this one.")
                changed = True


def _parent_state(home: Home, run: Run) -> State | None:
    """None without a parent; a parent that is gone or damaged counts as failed."""
    if run.record.parent is None:
        return None
    try:
        return runs.load(home, run.record.parent).status().state
    except KatherineError:
        return State.failed


def blocked(home: Home, run: Run) -> bool:
    """Whether an interrupted ancestor keeps the queued run from ever beginning."""
    while run.record.parent is not None:
        try:
            run = runs.load(home, run.record.parent)
            state = run.status().state
        except KatherineError:
            return False
        if state is not State.queued:
            return state is State.interrupted
    return False


def _wake(home: Home) -> None:
    # The supervisor's place is taken here and handed to the child, and a supervisor gives it up under this same
    # mutex, after finding the queue empty. So there is never a second one, and no run is left without one.
    place = slot.bind(home, "supervisor")
    if place is None:
        return
    with place:
        if next_runnable(home) is None:
            return
        secrets = {name for kind in worker_module(WORKER).KINDS.values() for name in kind.secrets}
        if pod.here():
            # For auto-stop, which the supervisor starts; no worker gets it.
            secrets.add(pod.KEY)
        arguments = ["--home", str(home.root.absolute()), "--worker", WORKER]
        detached.start(home, place, "jobs.supervisor", arguments, home.root / "supervisor.log", *secrets)
