"""A whole pipeline in one request: runs that are each the next one's parent. Carrying them out, in order and only
where the one before succeeded, is the queue's."""

from typing import Any

from jobs import queue
from katherine.runs import Run
from katherine.settings import Home


def start(
    home: Home,
    dataset_id: str,
    sft: dict[str, Any],
    dpo: dict[str, Any] | None,
    export: dict[str, Any] | None,
    who: str,
    probe: dict[str, Any] | None = None,
) -> list[Run]:
    """Queue SFT, then DPO, export and probes where their recipes are given (an empty one is all defaults), and begin.
    Returns the runs in that order. Raises RecipeError or NotFound before anything is queued."""
    asked = (("sft", sft), ("dpo", dpo), ("export", export), ("probe", probe))
    stages = [(kind, queue.complete(kind, recipe)) for kind, recipe in asked if recipe is not None]
    queued: list[Run] = []
    for kind, recipe in stages:
        parent = queued[-1].id if queued else None
        # Begun when all are queued, so that SFT cannot end before DPO knows whose child it is.
        queued.append(queue.submit(home, kind, recipe=recipe, who=who, parent=parent, dataset=dataset_id, start=False))
    queue.wake(home)
    return queued
