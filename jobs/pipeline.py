"""A whole pipeline in one request: runs that are each the next one's parent. What cannot work is said before the first
of them costs anything; carrying them out, in order and only where the one before succeeded, is the queue's."""

from typing import Any

from jobs import queue
from katherine.errors import RecipeError
from katherine.runs import Run
from katherine.settings import Home

ORDER = ("sft", "dpo", "export", "probe")


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
    Returns the runs in that order.

    Raises, before anything is queued: NotFound for the dataset; RecipeError with every reason why a stage could not
    do its work, here and on this dataset.
    """
    asked = {kind: recipe for kind, recipe in zip(ORDER, (sft, dpo, export, probe), strict=True) if recipe is not None}
    stages: dict[str, dict[str, Any]] = {}
    reasons: list[str] = []
    for kind, recipe in asked.items():
        try:
            stages[kind] = queue.complete(kind, recipe)
        except RecipeError as error:
            reasons += [f"{kind}: {reason}" for reason in error.reasons]
    if reasons:
        raise RecipeError(reasons)
    if "probe" in stages and "export" not in stages:
        reasons.append("probe: probes ask an export's files: queue the export as well.")
    kinds = queue.worker_module(queue.WORKER).KINDS
    for kind, recipe in stages.items():
        reasons += [f"{kind}: {reason}" for reason in kinds[kind].obstacles(home, dataset_id, recipe)]
    if reasons:
        raise RecipeError(reasons)
    queued: list[Run] = []
    for kind, recipe in stages.items():
        parent = queued[-1].id if queued else None
        # Begun when all are queued, so that SFT cannot end before DPO knows whose child it is.
        queued.append(queue.submit(home, kind, recipe=recipe, who=who, parent=parent, dataset=dataset_id, start=False))
    queue.wake(home)
    return queued
