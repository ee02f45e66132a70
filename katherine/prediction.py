"""What was expected of a run when it began, kept in its folder, and how that compares with what came. Reckoning it is
estimate's business."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from katherine import estimate, experience, hardware, recipe, runs, units
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.yardstick import Figure

FILE = "estimate.json"


def freeze(home: Home, run: Run) -> None:
    """Writes what is expected of a run on this machine into its folder, once: a resumed run keeps the first word. A
    kind of run that has no recipe gets none. Raises NotFound, DataError or RecipeError where it cannot be reckoned."""
    if (run.path / FILE).exists() or run.record.kind not in recipe.KINDS:
        return
    here = hardware.of_run(run)
    used = here.used if here else 1
    found, steps = estimate.alone(home, run.record.kind, experience.recipes_of(home, run), run.record.dataset, used)
    stage = found.stages[run.record.kind]
    runs.write_json(
        run.path / FILE,
        {
            "made": runs.now(),
            "machine": found.machine.name,
            "hourly": found.machine.hourly,
            "steps": steps,
            "seconds": asdict(stage.seconds) if stage.seconds else None,
            "missing": list(stage.missing),
            "memory_gib": asdict(stage.memory) if stage.memory else None,
            "dollars": asdict(found.dollars) if found.dollars else None,
        },
    )


def of_run(run: Run) -> dict[str, Any] | None:
    """What was expected of a run when it began, as freeze wrote it; None where nothing was."""
    try:
        found = json.loads((run.path / FILE).read_bytes())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Compared:
    """A line of predicted beside actual, in words; empty where one is not known."""

    what: str
    predicted: str
    actual: str


def compared(run: Run) -> list[Compared]:
    """Steps, time, memory and dollars of a run: what was said when it began, and what came. While it is under way the
    actual figures are those so far. Empty for a run of which neither is known. Raises DataError for a damaged status
    or result."""
    said = of_run(run) or {}
    status = run.status()
    so_far = "" if status.state in runs.ENDED else " so far"
    hourly = said.get("hourly")
    if hourly is None and (machine := hardware.of_run(run)):
        hourly = machine.hourly
    memory = experience.memory_gib(run)
    steps = said.get("steps")
    made = status.step if steps is not None and status.of else None
    if status.state is State.succeeded and run.record.kind in ("sft", "dpo"):
        made = runs.result(run).get("steps")
    most = "" if memory is None else f"{estimate.gib(memory)}{so_far}"
    time = f"{units.duration(status.seconds)}{so_far}" if status.started else ""
    cost = f"{units.dollars(status.seconds * hourly / 3600)}{so_far}" if hourly is not None and status.started else ""
    lines = [
        Compared("steps", "" if steps is None else str(steps), "" if made is None else f"{made}{so_far}"),
        Compared("time", _said(said, "seconds", units.duration), time),
        Compared("memory", _said(said, "memory_gib", estimate.gib), most),
        Compared("dollars", _said(said, "dollars", units.dollars), cost),
    ]
    return [line for line in lines if line.predicted or line.actual]


def _said(frozen: Mapping[str, Any], name: str, form: Callable[[float], str]) -> str:
    found = frozen.get(name)
    if not isinstance(found, dict):
        return ""
    partial = name != "memory_gib" and bool(frozen.get("missing"))
    return estimate.words(Figure(**found), form, at_least=partial)
