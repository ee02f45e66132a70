"""Several runs in one request, each the next one's parent: a whole pipeline, what builds on a run that is there, and a
run made again. What cannot work is said before the first of them costs anything; carrying them out, in order and only
where the one before succeeded, is the queue's."""

from collections.abc import Mapping
from typing import Any

from jobs import queue
from katherine import runs
from katherine.errors import NotFound, RecipeError
from katherine.runs import Run, State
from katherine.settings import Home

ORDER = ("sft", "dpo", "export", "probe")
# What each kind can build on: an adapter, or an export's files.
BUILDS_ON: dict[str, tuple[str, ...]] = {"sft": (), "dpo": ("sft",), "export": ("dpo", "sft"), "probe": ("export",)}


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
    Returns the runs in that order. Asked for twice, or by a hundred at once, while they are unfinished: the same runs.

    Raises, before anything is queued: NotFound for the dataset; RecipeError with every reason why a stage could not
    do its work, here and on this dataset.
    """
    given = zip(ORDER, (sft, dpo, export, probe), strict=True)
    stages = _possible(home, dataset_id, {kind: recipe for kind, recipe in given if recipe is not None}, above=None)
    return queue.submit_chain(home, stages, who=who, dataset=dataset_id)


def start_on(
    home: Home, parent_id: str, recipes: Mapping[str, dict[str, Any]], who: str, dataset_id: str | None = None
) -> list[Run]:
    """Queue what builds on a run that is there: DPO, export and probes, those of them whose recipes are given (by
    kind; an empty recipe is all defaults), each on the one before. `dataset_id` is the parent's unless given. Behind a
    parent that is still under way they wait for it. Returns the runs in the pipeline's order, as start does.

    Raises, before anything is queued: NotFound for the parent or the dataset; RecipeError with every reason why it
    could not work.
    """
    if unknown := [kind for kind in recipes if kind not in ORDER]:
        raise NotFound(f"There is no stage {unknown[0]!r}; the stages are {', '.join(ORDER)}.")
    parent = runs.load(home, parent_id)
    if reason := _unfit(parent):
        raise RecipeError([reason])
    dataset = dataset_id or parent.record.dataset
    if dataset is None:
        raise RecipeError([f"run {parent.id} names no dataset: say on which one to go on."])
    wanted = {kind: recipes[kind] for kind in ORDER if kind in recipes}
    stages = _possible(home, dataset, wanted, above=parent.record.kind)
    return queue.submit_chain(home, stages, who=who, dataset=dataset, parent=parent.id)


def again(home: Home, run_id: str, changes: Mapping[str, Any], who: str) -> Run:
    """Queue a new run of the same kind, on the same parent and dataset, with `changes` to its recipe (by field).

    Raises NotFound for the run, RecipeError with every reason why it could not work.
    """
    old = runs.load(home, run_id)
    recipe = {old.record.kind: old.record.recipe | dict(changes)}
    if old.record.parent is not None:
        (run,) = start_on(home, old.record.parent, recipe, who, old.record.dataset)
        return run
    if old.record.dataset is None:
        raise RecipeError([f"run {old.id} names no dataset: start one on a dataset instead."])
    stages = _possible(home, old.record.dataset, recipe, above=None)
    (run,) = queue.submit_chain(home, stages, who=who, dataset=old.record.dataset)
    return run


def _unfit(parent: Run) -> str:
    """Why nothing can build on the run, else empty."""
    state = parent.status().state
    if state in (State.failed, State.cancelled, State.interrupted):
        return f"run {parent.id} was {state}, so that there is nothing to build on: resume it first, or choose another."
    return ""


def _possible(
    home: Home, dataset_id: str, asked: Mapping[str, dict[str, Any]], above: str | None
) -> dict[str, dict[str, Any]]:
    """The recipes, complete. `above` is the kind of run that the first builds on. Raises NotFound for the dataset,
    and RecipeError with every reason why a stage could not do its work."""
    if reasons := obstacles(home, dataset_id, asked, above):
        raise RecipeError(reasons)
    return {kind: queue.complete(kind, recipe) for kind, recipe in asked.items()}


def obstacles(home: Home, dataset_id: str, asked: Mapping[str, dict[str, Any]], above: str | None = None) -> list[str]:
    """Why these recipes (by kind, in the pipeline's order) could not do their work here and on this dataset, one
    sentence each, empty where nothing stands against it. `above`: the kind of run that the first builds on. Raises
    NotFound for the dataset."""
    if not asked:
        return ["No stage was asked for: name at least one."]
    stages: dict[str, dict[str, Any]] = {}
    reasons: list[str] = []
    for kind, recipe in asked.items():
        try:
            stages[kind] = queue.complete(kind, recipe)
        except RecipeError as error:
            reasons += [f"{kind}: {reason}" for reason in error.reasons]
    if reasons:
        return reasons
    for kind in stages:
        reasons += _misplaced(kind, above)
        above = kind
    kinds = queue.worker_module(queue.WORKER).KINDS
    for kind, recipe in stages.items():
        reasons += [f"{kind}: {reason}" for reason in kinds[kind].obstacles(home, dataset_id, recipe)]
    return reasons


def _misplaced(kind: str, above: str | None) -> list[str]:
    possible = BUILDS_ON[kind]
    if above is None and possible:
        return [f"{kind}: it builds on a run of {' or '.join(possible)}: start that as well, or name one."]
    if above is not None and above not in possible:
        if kind == "probe":
            return ["probe: probes ask an export's files: queue the export as well."]
        if not possible:
            return [f"{kind}: it begins with the base, and builds on no run: start it on a dataset alone."]
        return [f"{kind}: it builds on a run of {' or '.join(possible)}, not of {above}."]
    return []
