"""Small background work that needs no GPU: preparing a dataset, fetching files, pushing an export. Each errand is a
folder and a detached process that carries it out, so that it outlives the page that asked. What is done is katherine's;
runs, which take the GPU in turn, are the queue's.

    KATHERINE_HOME/errands/<id>/   request.json  status.json  result.json  log.txt
"""

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from jobs import detached, printed, queue, slot
from katherine import audit, disk, publish, runs
from katherine.errors import Busy, DataError, KatherineError, NotFound
from katherine.progress import Progress, Stopped
from katherine.runs import ENDED, State, Status
from katherine.settings import Home

# Ended errands that are kept, newest first: enough to read back a day's mistakes.
KEPT = 50
# status.json is replaced at most twice a second: each is a round trip to a network volume, and no screen is faster.
SAVE = 0.5
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]*")


@dataclass(frozen=True, slots=True)
class Errand:
    """request: what was asked, as JSON values. created: ISO 8601, UTC."""

    path: Path
    kind: str
    request: dict[str, Any]
    who: str
    created: str

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def status(self) -> Status:
        """One whose process is gone without an end of its own is interrupted, or cancelled where it was told to stop.
        Raises DataError where status.json is missing or damaged."""
        status = self._written()
        if status.state in ENDED:
            return status
        if slot.is_held(self._home, _place(self)):
            return replace(status, state=State.stopping) if self._stop.exists() else status
        # It may have written its end and left between the two looks.
        status = self._written()
        if status.state in ENDED:
            return status
        if self._stop.exists():
            return replace(status, state=State.cancelled, reason="Stopped by you and killed.", remedy="")
        return replace(
            status,
            state=State.interrupted,
            reason="The machine went away or the process was killed.",
            remedy="Start it again.",
        )

    def result(self) -> dict[str, Any]:
        """What its work returned. Raises NotFound before it succeeded."""
        try:
            return json.loads((self.path / "result.json").read_bytes())
        except (OSError, ValueError):
            raise NotFound(f"Errand {self.id} has no result.") from None

    @property
    def _home(self) -> Home:
        return Home(self.path.parent.parent)

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def _written(self) -> Status:
        return runs.read_status(self.path / "status.json", "Remove the errand's folder.")


def start(home: Home, kind: str, request: dict[str, Any], who: str) -> Errand:
    """Begin an errand. While one with the same kind and request is under way, that one is returned: a double click
    starts once. Raises NotFound for the kind, Busy where another one of it must end first."""
    if kind not in KINDS:
        raise NotFound(f"There is no kind of errand {kind!r}; the kinds are {', '.join(KINDS)}.")
    # A note may hold what somebody pasted by mistake.
    request = audit.without_secrets(json.loads(json.dumps(request)))
    alone = KINDS[kind].alone
    with slot.mutex(home):
        for errand in under_way(home):
            if (errand.kind, errand.request) == (kind, request):
                return errand
            if alone and errand.kind == kind and errand.request.get(alone) == request.get(alone):
                raise Busy(f"Another {kind} errand is at work on {request[alone]}, for {errand.who}. Wait for its end.")
        errand = _create(home, kind, request, who)
        _spawn(home, errand)
        _forget_old(home)
    return errand


def load(home: Home, errand_id: str) -> Errand:
    """Raises NotFound for an id that is not an errand's, DataError where request.json cannot be read."""
    path = home.errands / errand_id
    if not _ID.fullmatch(errand_id) or not (path / "request.json").is_file():
        raise NotFound(f"There is no errand {errand_id!r} in {home.errands}.")
    try:
        raw = json.loads((path / "request.json").read_bytes())
        return Errand(path, raw["kind"], raw["request"], raw["who"], raw["created"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path / 'request.json'} is damaged ({error}). Remove the errand's folder.") from error


def everyone(home: Home) -> list[Errand]:
    """All errands, newest first. Folders that cannot be read are left out."""
    found = []
    for path in home.errands.glob("[!.]*"):
        with suppress(NotFound, DataError):
            found.append(load(home, path.name))
    return sorted(found, key=lambda errand: (errand.created, errand.id), reverse=True)


def under_way(home: Home) -> list[Errand]:
    """Errands that have not ended, newest first."""
    found = []
    for errand in everyone(home):
        with suppress(DataError):
            if errand.status().state not in ENDED:
                found.append(errand)
    return found


def stop(home: Home, errand_id: str) -> Status:
    """Ask an errand to stop; asked again, its processes are killed. What it had made is removed. An ended one is left
    alone. Returns its status as it is then."""
    errand = load(home, errand_id)
    status = errand.status()
    if status.state in ENDED:
        return status
    again = errand._stop.exists()
    errand._stop.touch()
    # One that has not said its pid yet finds the file when it does.
    if status.pid is not None and queue.ticks(status.pid) == status.pid_started:
        with suppress(ProcessLookupError):
            # It leads a group of its own, since it was started in its own session.
            os.killpg(status.pid, signal.SIGKILL if again else signal.SIGTERM)
    return errand.status()


def wait(home: Home, errand_id: str, timeout: float | None = None) -> Status:
    """The errand's status once it has ended, or after `timeout` seconds."""
    errand, begun = load(home, errand_id), time.monotonic()
    while (status := errand.status()).state not in ENDED:
        if timeout is not None and time.monotonic() - begun >= timeout:
            break
        time.sleep(0.05)
    return status


def _create(home: Home, kind: str, request: dict[str, Any], who: str) -> Errand:
    """A folder that appears whole, in state running."""
    created = runs.now()
    errand_id = f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{kind}-{secrets.token_hex(3)}"
    draft = home.errands / f".{errand_id}"
    draft.mkdir(parents=True)
    runs.write_json(draft / "request.json", {"kind": kind, "request": request, "who": who, "created": created})
    runs.write_json(draft / "status.json", asdict(Status(State.running, phase="starting", started=created)))
    draft.rename(home.errands / errand_id)
    return Errand(home.errands / errand_id, kind, request, who, created)


def _place(errand: Errand) -> str:
    return f"errand-{errand.id}"


def _spawn(home: Home, errand: Errand) -> None:
    place = slot.bind(home, _place(errand))
    assert place is not None, "an id is made once"
    with place:
        detached.start(
            home,
            place,
            "jobs.errands",
            ["--home", str(home.root.absolute()), "--errand", errand.id],
            errand.log,
            *KINDS[errand.kind].secrets,
            PYTHONUNBUFFERED="1",
            # Only the token that is named is used, never one that lies on this machine.
            HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
        )


def _forget_old(home: Home) -> None:
    for errand in everyone(home)[KEPT:]:
        try:
            if errand.status().state not in ENDED:
                continue
        except DataError:
            pass  # damaged, or half removed when the machine went away: nobody can be told how it ended
        # Out of sight first: a folder that is half removed must not be taken for an errand.
        with suppress(OSError):
            gone = errand.path.rename(errand.path.with_name(f".gone-{errand.path.name}"))
            shutil.rmtree(gone, ignore_errors=True)


# ------------------------------------------------------------------------------------------ in the errand's own process


@dataclass(frozen=True, slots=True)
class Kind:
    """work: does it, and returns what goes into result.json. secrets: names of secrets that its process may see.
    stopped: what is left of it after a stop, in words. alone: the word of a request of which one is carried out at a
    time; "" where any number may be."""

    work: Callable[[Home, dict[str, Any], Progress], dict[str, Any]]
    secrets: tuple[str, ...] = ()
    stopped: str = "Nothing was kept."
    alone: str = ""


def _prepare(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `paths`, or `dataset` whose files are taken again and `also`, files that are added to them; then the
    options of corpus.prepare."""
    from katherine import bases, corpus
    from katherine.template import ChatTemplate

    options = dict(request)
    paths, dataset = options.pop("paths", None), options.pop("dataset", None)
    also = [Path(path) for path in options.pop("also", ())]
    progress.phase("look for the tokenizer")
    base, remark = bases.counting(home, options.pop("base"))
    if remark:
        progress.say(remark)
    template = ChatTemplate.load(bases.tokenizer(home, base))
    if dataset is not None:
        made = corpus.change(home, dataset, also=also, template=template, base=base, progress=progress, **options)
    else:
        files = [Path(path) for path in paths or []]
        made = corpus.prepare(files, home, template=template, base=base, progress=progress, **options)
    return {"dataset": made.id, "remark": remark}


def _fetch(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `path`, as hub.fetch takes it."""
    from katherine import hub

    folder = hub.fetch(home, request["path"], progress)
    return {"folder": folder.relative_to(home.inbox).as_posix()}


def _compare(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `first` and `second`, ids of datasets."""
    from katherine import shelf

    progress.phase("compare")
    found = shelf.compare(home, request["first"], request["second"])
    options = {name: list(values) for name, values in found.options.items()}
    return {"sft": asdict(found.sft), "dpo": asdict(found.dpo), "options": options}


def _approve(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `export`, `who`, `role`, `note`, and `files` unless it is for all that passed. The role is what the web
    process or the command line knows of the asker, never what a page says."""
    from katherine import approval

    given = approval.approve(
        home,
        request["export"],
        who=request["who"],
        role=request["role"],
        note=request.get("note", ""),
        files=request.get("files"),
        progress=progress,
    )
    return {"approval": given.id}


def _verify(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `export`, whose approved files are read whole."""
    from katherine import approval

    return {"approval": approval.require(home, request["export"], progress).id}


def _push(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `export`, `to`, `who` and `role`, and `repo` where it goes to a model repository too. The role is what
    the web process or the command line knows of the asker, never what a page says."""
    from katherine import publish

    receipt = publish.push(
        home,
        request["export"],
        request["to"],
        who=request["who"],
        role=request["role"],
        also_repo=request.get("repo") or None,
        progress=progress,
    )
    return {"receipt": receipt.id}


def _base(home: Home, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """request: `export`, whose bare base is made into a file to talk to."""
    from katherine import bare_base

    return {"column": bare_base.make(home, request["export"], progress).id}


KINDS = {
    # Both look on the hub: for a tokenizer, which a gated base gives only to a token that accepted its terms.
    "prepare": Kind(_prepare, ("HF_READ_TOKEN",)),
    "fetch": Kind(_fetch, ("HF_READ_TOKEN",)),
    "compare": Kind(_compare),
    # Where the base is not on this machine any more.
    "base": Kind(_base, ("HF_READ_TOKEN",)),
    "approve": Kind(_approve, alone="export"),
    "verify": Kind(_verify, alone="export"),
    "push": Kind(_push, ("HF_TOKEN",), publish.LEFT),
}


class ErrandProgress:
    """A Progress that keeps the errand's status.json."""

    def __init__(self, errand: Errand, status: Status):
        self._path = errand.path / "status.json"
        self._status = status
        self._saved = 0.0

    def phase(self, name: str) -> None:
        self._status = replace(self._status, phase=name, step=0, of=0)
        self._save_sometimes(now=True)

    def step(self, step: int, of: int) -> None:
        first = of > 0 and not self._status.of
        self._status = replace(self._status, step=step, of=of)
        # The first one at once: else a short phase, and the begin of a long one, would look as if nothing moved.
        self._save_sometimes(now=first)

    def metric(self, **values: float | int | str | None) -> None:
        print(json.dumps(values), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def stop_requested(self) -> bool:
        return False  # a stop is a signal here, and ends the work wherever it is

    def _save_sometimes(self, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._saved >= SAVE:
            self._saved = moment
            # A full disk now may have room again at the end, and the work will say so itself.
            with suppress(OSError):
                runs.write_json(self._path, asdict(self._status))

    def end(self, state: State, reason: str = "", remedy: str = "") -> None:
        # The whole text is in the log; a reason has to fit on a screen.
        changes = queue.ended(state) | {"reason": audit.without_secrets(reason)[:2000], "remedy": remedy}
        self._status = replace(self._status, **changes)
        runs.write_json(self._path, asdict(self._status))


def _explain(error: BaseException, errand: Errand) -> tuple[str, str]:
    if isinstance(error, KatherineError):
        return str(error), ""
    if isinstance(error, MemoryError):
        return "Out of memory (the machine's).", "Close what else uses it, then start again."
    if disk.is_full(error):
        free = shutil.disk_usage(errand.path).free / 1e9
        place = error.filename or errand.path
        return f"Disk full while writing {place} ({free:.1f} GB free).", "Free some room, then start again."
    return f"A bug: {type(error).__name__}: {error}", f"The whole story is in {errand.log}."


def _carry_out(home: Home, errand: Errand) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit  # passes through every `except Exception` on its way, and what has to be removed is

    pid = os.getpid()
    status = replace(errand._written(), pid=pid, pid_started=queue.ticks(pid), machine=queue.machine())
    progress = ErrandProgress(errand, status)
    signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        progress.phase("starting")
        if errand._stop.exists():
            raise Stopped
        result = KINDS[errand.kind].work(home, errand.request, progress)
        runs.write_json(errand.path / "result.json", result)
        end: tuple[State, str, str] = (State.succeeded, "", "")
    except (SystemExit, Stopped):
        end = (State.cancelled, f"Stopped by you. {KINDS[errand.kind].stopped}", "")
    except Exception as error:
        traceback.print_exc()
        end, code = (State.failed, *_explain(error, errand)), 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    progress.end(*end)
    return code


def main() -> int:
    arguments = argparse.ArgumentParser(description="Carry out one errand; started by start().")
    arguments.add_argument("--home", type=Path, required=True)
    arguments.add_argument("--errand", required=True)
    arguments.add_argument("--place", type=int, required=True, help="descriptor that holds the errand's place")
    asked = arguments.parse_args()
    os.set_inheritable(asked.place, False)
    home = Home(asked.home)
    with printed.without_secrets():
        code = _carry_out(home, load(home, asked.errand))
    # Without waiting for threads that a library may have left hanging in the network.
    os._exit(code)


if __name__ == "__main__":
    main()
