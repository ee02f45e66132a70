"""What finished runs measured: how long until the first step, a step, the parts of an export, the memory; each with the
machine it was on. Reading it costs little: the ends of a log, once a run. What follows from it is estimate's."""

import os
import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from katherine import hardware, recipe, runs
from katherine.errors import KatherineError
from katherine.hardware import Hardware
from katherine.recipe import KINDS, Recipe
from katherine.runs import Run, State, Status
from katherine.settings import Home

# Enough to learn from, and few enough to read from a slow volume while somebody waits.
NEWEST = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """A run that succeeded at its first attempt. recipes: its own and those of the runs it builds on, by kind.

    setup: seconds from its start to its first finished step. first: of these, that step's own. step: the mean of those
    after that, with checkpoints and evaluations between them. after: from the last step to its end. memory: the most
    that training needed, GiB. parts: seconds of an export's parts.
    None, or nothing in it, where it has no such thing."""

    run: str
    kind: str
    ended: str
    dataset: str | None
    recipes: dict[str, Recipe]
    hardware: Hardware
    seconds: float
    steps: int = 0
    setup: float | None = None
    first: float = 0.0
    step: float | None = None
    after: float = 0.0
    memory: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


_lock = threading.Lock()
_known: dict[Path, tuple[int, Sample | None]] = {}


def samples(home: Home) -> list[Sample]:
    """Of the newest runs, newest first."""
    try:
        # A run's id begins with the moment of its birth.
        names = sorted((name for name in os.listdir(home.runs) if not name.startswith(".")), reverse=True)
    except FileNotFoundError:
        return []
    found = [_look(home, name) for name in names[:NEWEST]]
    return sorted((sample for sample in found if sample), key=lambda sample: sample.ended, reverse=True)


def recipes_of(home: Home, run: Run) -> dict[str, Recipe]:
    """The run's recipe and those of the runs it builds on, nearest first, by kind. Raises RecipeError, NotFound,
    DataError."""
    found: dict[str, Recipe] = {}
    at: Run | None = run
    while at is not None:
        record = at.record
        if record.kind in KINDS and record.kind not in found:
            found[record.kind] = recipe.load(record.kind, record.recipe)
        at = runs.load(home, record.parent) if record.parent else None
    return found


def memory_gib(run: Run) -> float | None:
    """The most memory that training needed so far, as its log says."""
    for row in run.newest_metrics():
        if isinstance(value := row.get("memory_gib"), int | float):
            return float(value)
    return None


def _look(home: Home, name: str) -> Sample | None:
    path = home.runs / name
    try:
        mark = (path / "status.json").stat().st_mtime_ns
    except OSError:
        return None
    with _lock:
        known = _known.get(path)
    if known and known[0] == mark:
        return known[1]
    try:
        found = _read(home, runs.load(home, name))
    except (KatherineError, OSError, ValueError, KeyError, TypeError):
        found = None  # what it lacks or has damaged, it cannot teach
    with _lock:
        _known[path] = mark, found
    return found


def _read(home: Home, run: Run) -> Sample | None:
    status = run.status()
    machine = hardware.of_run(run)
    if status.state is not State.succeeded or status.attempt != 1 or machine is None or not status.ended:
        return None
    sample = Sample(
        run.id,
        run.record.kind,
        status.ended,
        run.record.dataset,
        recipes_of(home, run),
        machine,
        runs.seconds(run),
        **_measured(run, status),
    )
    return sample


def _measured(run: Run, status: Status) -> dict[str, Any]:
    if run.record.kind == "export":
        return {"parts": {name: float(spent) for name, spent in runs.result(run)["seconds"].items()}}
    if run.record.kind not in ("sft", "dpo"):
        return {}
    first = next((row for row in run.first_metrics() if "loss" in row), None)
    last = next((row for row in run.newest_metrics() if "loss" in row), None)
    if first is None or last is None or not status.started or not status.ended:
        return {}
    made = last["step"] - first["step"]
    return {
        "steps": int(last["step"]),
        "setup": _between(status.started, first["time"]),
        "first": float(first["seconds"]),
        "step": (last["seconds"] - first["seconds"]) / made if made > 0 else None,
        "after": _between(last["time"], status.ended),
        "memory": float(last["memory_gib"]),
    }


def _between(begun: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()
