"""The run folder: what a run was asked, where it is, what it measured. Files are the truth, and each has one writer at
a time: run.json is written once at birth, status.json (replaced whole) by the supervisor while the run is under way
and by the queue otherwise, metrics.jsonl by the worker (append only). Starting and ending runs is the business of
`jobs`."""

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from katherine.errors import DataError, NotFound
from katherine.settings import PROJECT, Home

PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "unsloth", "bitsandbytes", "llama-cpp-python", "gguf",
)  # fmt: skip

# A row of training is about 300 bytes: two hundred of them, in one read from a network volume.
END_BYTES = 65_536


class State(StrEnum):
    queued = "queued"
    running = "running"
    stopping = "stopping"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"
    interrupted = "interrupted"


ENDED = frozenset({State.succeeded, State.failed, State.cancelled, State.interrupted})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Frozen at birth.

    kind: "sft", "dpo", "export" or "probe". parent: the run whose output this one builds on, or None.
    dataset: a dataset's id. inputs: sha256 or fingerprint by name, so that a changed input is noticed.
    """

    id: str
    kind: str
    created: str
    who: str
    parent: str | None
    dataset: str | None
    inputs: dict[str, str]
    recipe: dict[str, Any]
    versions: dict[str, str]
    revision: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """Times are ISO 8601 UTC. attempt counts how often the run was begun: 0 before its first start.

    pid is the worker's and supervisor its parent's, both None unless the run is under way; each with the clock ticks
    since boot at which it started, so that a reused pid is never taken for it. machine tells one boot of one machine
    or container from another, since pids mean nothing elsewhere.
    """

    state: State
    phase: str = ""
    step: int = 0
    of: int = 0
    attempt: int = 0
    pid: int | None = None
    pid_started: int | None = None
    supervisor: int | None = None
    supervisor_started: int | None = None
    machine: str | None = None
    heartbeat: str | None = None
    started: str | None = None
    phase_began: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    reason: str = ""
    remedy: str = ""

    @property
    def seconds(self) -> float:
        """From the last attempt's start to its end, or to now; 0 before it started."""
        if not self.started:
            return 0.0
        end = datetime.fromisoformat(self.ended) if self.ended else datetime.now(UTC)
        return (end - datetime.fromisoformat(self.started)).total_seconds()


@dataclass(frozen=True, slots=True)
class Run:
    path: Path
    record: RunRecord = field(compare=False)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def status(self) -> Status:
        """Raises DataError where status.json is missing or damaged."""
        return read_status(self.path / "status.json", "Restore it or remove the run's folder.")

    def set_status(self, **changes: Any) -> Status:
        status = replace(self.status(), **changes)
        write_json(self.path / "status.json", asdict(status))
        return status

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Every logged row. A torn line (the machine died while writing) is skipped; a zero is a value."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as lines:
            yield from _rows(lines)

    def first_metrics(self) -> Iterator[dict[str, Any]]:
        """The rows in the first END_BYTES of the log."""
        return _rows(self._end_of_metrics(False))

    def newest_metrics(self) -> Iterator[dict[str, Any]]:
        """The rows in the last END_BYTES of the log, the newest first. Each is decoded when it is asked for: a page
        wants a few, every two seconds."""
        return _rows(reversed(self._end_of_metrics(True)))

    def _end_of_metrics(self, last: bool) -> list[bytes]:
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                begin = max(file.seek(0, 2) - END_BYTES, 0) if last else 0
                file.seek(begin)
                lines = file.read(END_BYTES).split(b"\n")
        except OSError:
            return []
        # What begins or ends in the middle is no JSON; but the rest of a row might be, so the first goes anyway.
        return lines[1:] if begin else lines


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def read_status(path: Path, remedy: str) -> Status:
    """A status.json, with what a later version added left out. Raises DataError, ending in the remedy, where it is
    missing or damaged."""
    try:
        raw = json.loads(path.read_bytes())
        known = {f.name for f in fields(Status)}
        return Status(**{k: v for k, v in raw.items() if k in known} | {"state": State(raw["state"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}). {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old or the new, never half; it survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        # A lone surrogate (a file name that is not UTF-8) becomes its \\u escape, which is what JSON calls it.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
            json.dump(value, out, indent=2, ensure_ascii=False)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        # On a full disk the half that was written would take room that the next attempt needs.
        temporary.unlink(missing_ok=True)
        raise


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The project's git revision, with + where the tree has changes; None outside a checkout."""
    git = ["git", "-C", str(PROJECT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def create(
    home: Home,
    kind: str,
    *,
    recipe: dict[str, Any],
    who: str,
    parent: str | None = None,
    dataset: str | None = None,
    inputs: dict[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Run:
    """A new run folder in state queued, with `files` (name → text) in its out folder. The folder appears whole: it is
    filled beside its place and renamed."""
    created = now()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run_id = f"{stamp}-{kind}-{secrets.token_hex(3)}"
    record = RunRecord(run_id, kind, created, who, parent, dataset, inputs or {}, recipe, versions(), revision())
    home.runs.mkdir(parents=True, exist_ok=True)
    draft = home.runs / f".{run_id}"
    (draft / "out").mkdir(parents=True)
    for name, text in (files or {}).items():
        (draft / "out" / name).write_text(text, encoding="utf-8")
    write_json(draft / "run.json", asdict(record))
    write_json(draft / "status.json", asdict(Status(State.queued)))
    draft.rename(home.runs / run_id)
    return Run(home.runs / run_id, record)


def load(home: Home, run_id: str) -> Run:
    """Raises NotFound for an id that is not a run's, DataError for a folder whose run.json cannot be read."""
    path = home.runs / run_id
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z-]*", run_id) or not (path / "run.json").is_file():
        raise NotFound(f"There is no run {run_id!r} in {home.runs}. `python app.py runs` lists them.")
    try:
        raw = json.loads((path / "run.json").read_bytes())
        known = {f.name for f in fields(RunRecord)}
        return Run(path, RunRecord(**{k: v for k, v in raw.items() if k in known}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path / 'run.json'} is damaged ({error}). Restore it or remove the folder.") from error


def everyone(home: Home) -> list[Run]:
    """All runs, oldest first. Folders that cannot be read are left out."""
    if not home.runs.is_dir():
        return []
    found = []
    for path in sorted(home.runs.iterdir()):
        if not path.name.startswith("."):
            try:
                found.append(load(home, path.name))
            except (NotFound, DataError):
                continue
    return sorted(found, key=lambda run: (run.record.created, run.id))


def result(run: Run) -> dict[str, Any]:
    """What the run's stage returned. Raises NotFound before it succeeded."""
    path = run.path / "result.json"
    if not path.is_file():
        raise NotFound(f"Run {run.id} has no result: it is {run.status().state}.")
    return json.loads(path.read_text(encoding="utf-8"))


def seconds(run: Run) -> float:
    """From the last attempt's start to its end, or to now; 0 before it started."""
    return run.status().seconds
