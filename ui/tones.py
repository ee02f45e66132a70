"""How states look on the page: one tone each, the same in every table, line and drawing."""

from katherine import lineage
from katherine.runs import State

TONES: dict[str, str] = {
    State.queued: "dim",
    State.running: "busy",
    State.stopping: "busy",
    State.succeeded: "good",
    State.failed: "bad",
    State.cancelled: "warn",
    State.interrupted: "warn",
    lineage.MISSING: "bad",
    lineage.DAMAGED: "bad",
    lineage.CHANGED: "warn",
}


def of(state: str) -> str:
    return TONES.get(state, "")


def short(run_id: str) -> str:
    """A run's id without its time, which stands beside it: "sft-54eff0". What is no such id stays as it is."""
    parts = run_id.split("-", 2)
    return parts[2] if len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit() else run_id
