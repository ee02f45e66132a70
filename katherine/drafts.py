"""What the operator is about to start: dataset, stages and their recipes, in one file of the home, so that pages and
the command line meet there and a reload loses nothing. Starting it is jobs.pipeline's business."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from katherine import gpu, recipe, runs
from katherine.errors import KatherineError, NotFound, RecipeError, SetupError
from katherine.recipe import KINDS, Recipe
from katherine.settings import Home

# A pipeline begins with SFT: the other stages build on its adapter.
ALWAYS = "sft"
# Two browser tabs may change two things at once; the file is read and written as one act.
_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class Draft:
    """dataset: its id, or None. preset: the name it began from. values: a complete recipe of every kind, as JSON
    values. stages: the kinds that are to be started, in order. run: the id of the past run that its values came from,
    or None. remarks: what could not be kept of the file, a sentence each; never saved."""

    dataset: str | None
    preset: str
    values: dict[str, dict[str, Any]]
    stages: tuple[str, ...] = tuple(KINDS)
    run: str | None = None
    remarks: tuple[str, ...] = ()

    def recipe(self, kind: str) -> Recipe:
        """Raises NotFound for an unknown kind."""
        return recipe.load(kind, self.values.get(kind, {}))

    def asked(self) -> dict[str, dict[str, Any] | None]:
        """The recipes by kind as jobs.pipeline.start takes them: None for a stage that is left out."""
        return {kind: self.values[kind] if kind in self.stages else None for kind in KINDS}


def path(home: Home) -> Path:
    return home.root / "draft.json"


def load(home: Home) -> Draft:
    """The draft on disk; where there is none, or a damaged one, the default. What an older version wrote and this one
    does not know is left out, and `remarks` says so."""
    try:
        raw = json.loads(path(home).read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return default(home)
    except (OSError, ValueError, RecursionError) as error:
        return replace(default(home), remarks=(f"{path(home)} was damaged ({error}): this is the default again.",))
    return _read(home, raw)


def save(home: Home, draft: Draft) -> Draft:
    """Writes the draft, and returns it with every recipe completed. Raises RecipeError with every reason where a recipe
    cannot work; the file stays as it was."""
    values: dict[str, dict[str, Any]] = {}
    reasons: list[str] = []
    for kind in KINDS:
        try:
            values[kind] = recipe.load(kind, draft.values.get(kind, {})).model_dump(mode="json")
        except RecipeError as error:
            reasons += [f"{kind}: {reason}" for reason in error.reasons]
    if unknown := [stage for stage in draft.stages if stage not in KINDS]:
        reasons.append(f"There is no stage {unknown[0]!r}; the stages are {', '.join(KINDS)}.")
    if reasons:
        raise RecipeError(reasons)
    draft = replace(draft, values=values, stages=_stages(draft.stages), remarks=())
    if path(home).exists() and load(home) == draft:
        return draft  # pages look at the file's time to see whether anything changed
    kept = {"dataset": draft.dataset, "preset": draft.preset, "run": draft.run, "stages": list(draft.stages)}
    with _lock:
        home.root.mkdir(parents=True, exist_ok=True)
        runs.write_json(path(home), kept | {"values": values})
    return draft


def change(home: Home, **changes: Any) -> Draft:
    """Fields of the draft on disk replaced, the others kept: change(home, dataset="k0-12ab"). Raises as save does."""
    with _lock:
        return save(home, replace(load(home), **changes))


def set_recipe(home: Home, kind: str, values: dict[str, Any]) -> Draft:
    """One stage's recipe replaced. Raises RecipeError, with `fields`, where it cannot work, NotFound for the kind."""
    made = recipe.load(kind, values).model_dump(mode="json")
    with _lock:
        draft = load(home)
        return save(home, replace(draft, values=draft.values | {kind: made}))


@dataclass(frozen=True, slots=True)
class Edit:
    """What came of changes to one stage. draft: as it is now. kept: the fields that are in it now. wrong: the fields
    that cannot be, each with its reason. conflicts: why the others were not kept together."""

    draft: Draft
    kept: tuple[str, ...]
    wrong: dict[str, str]
    conflicts: tuple[str, ...]


def edit(home: Home, kind: str, changes: dict[str, Any]) -> Edit:
    """Fields of one stage changed in the draft as it is by then, the others left alone. One wrong field holds back no
    other; sound ones that do not fit each other are all left out. Raises NotFound for the kind."""
    with _lock:
        draft = load(home)
        others = draft.values.get(kind, {})
        wrong: dict[str, str] = {}
        try:
            recipe.load(kind, others | changes)
        except RecipeError as error:
            wrong = error.fields
        sound = {name: value for name, value in changes.items() if name not in wrong}
        if not sound:
            return Edit(draft, (), wrong, ())
        try:
            return Edit(set_recipe(home, kind, others | sound), tuple(sound), wrong, ())
        except RecipeError as error:
            return Edit(draft, (), wrong, tuple(error.reasons))


def set_stage(home: Home, kind: str, on: bool) -> Draft:
    """A stage in or out. SFT stays in; probes ask an export's files, so they come and go with the export."""
    with _lock:
        draft = load(home)
        stages = {*draft.stages, kind} if on else {*draft.stages} - {kind}
        if kind == "export" and not on:
            stages -= {"probe"}
        if kind == "probe" and on:
            stages |= {"export"}
        return save(home, replace(draft, stages=tuple(stages)))


def use_preset(home: Home, name: str) -> Draft:
    """All recipes as the preset has them; dataset and stages stay. Raises NotFound for the name."""
    with _lock:
        return save(home, replace(load(home), preset=name, values=_of_preset(home, name), run=None))


def use_run(home: Home, run_id: str) -> Draft:
    """The recipes of a past run and of the runs it builds on; stages that these lack, the dataset and the preset stay.
    Raises NotFound, DataError."""
    with _lock:
        draft = load(home)
        values = dict(draft.values)
        said: list[str] = []
        at: str | None = run_id
        seen: set[str] = set()
        while at is not None and at not in seen:
            seen.add(at)
            record = runs.load(home, at).record
            if record.kind in KINDS:
                base = recipe.preset(draft.preset, KINDS[record.kind], home=home)
                made, given_up = recipe.mend(KINDS[record.kind], record.recipe, base)
                values[record.kind] = made.model_dump(mode="json")
                said += given_up
            at = record.parent
        return replace(save(home, replace(draft, values=values, run=run_id)), remarks=tuple(said))


def to_json(draft: Draft) -> str:
    """The recipes of the draft's stages, to be read, copied, and pasted elsewhere."""
    return json.dumps({kind: draft.values[kind] for kind in draft.stages}, indent=2, ensure_ascii=False)


def paste(home: Home, text: str) -> Draft:
    """Recipes by kind from JSON text, as to_json writes them: those it names are replaced, whole, with the models'
    defaults for what they leave out; the others stay. Raises RecipeError with every reason; nothing changes then."""
    try:
        given = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise RecipeError(["The JSON is nested too deeply to be recipes."]) from None
    except ValueError as error:
        raise RecipeError([f"This is not JSON: {error}."]) from None
    if not isinstance(given, dict) or not given:
        raise RecipeError([f"Give one JSON object with recipes by stage: {', '.join(KINDS)}."])
    made: dict[str, dict[str, Any]] = {}
    reasons = []
    for kind, values in given.items():
        if kind not in KINDS:
            reasons.append(f"There is no stage {kind!r}; the stages are {', '.join(KINDS)}.")
        elif not isinstance(values, dict):
            reasons.append(f"{kind} is not an object of fields and values.")
        else:
            try:
                made[kind] = recipe.load(kind, values).model_dump(mode="json")
            except RecipeError as error:
                reasons += [f"{kind}: {reason}" for reason in error.reasons]
    if reasons:
        raise RecipeError(reasons)
    with _lock:
        draft = load(home)
        return save(home, replace(draft, values=draft.values | made, run=None))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """A field whose value is not the preset's."""

    kind: str
    about: recipe.About
    yours: Any
    theirs: Any


def differences(home: Home, draft: Draft) -> list[Difference]:
    """Where the draft's stages differ from the preset it began from. Raises NotFound where that is gone."""
    found = []
    for kind in draft.stages:
        model = KINDS[kind]
        changed = recipe.differences(draft.recipe(kind), recipe.preset(draft.preset, model, home=home))
        found += [
            Difference(kind, about, *changed[about.name]) for about in recipe.about(model) if about.name in changed
        ]
    return found


def default(home: Home) -> Draft:
    """k0 where there is a GPU, the small base's demo where there is none."""
    try:
        name = "k0" if gpu.read() else "demo"
    except SetupError:
        # A card whose driver does not answer is still what this machine is for.
        name = "k0"
    return Draft(None, name, _of_preset(home, name))


def _of_preset(home: Home, name: str) -> dict[str, dict[str, Any]]:
    return {kind: recipe.preset(name, model, home=home).model_dump(mode="json") for kind, model in KINDS.items()}


def _stages(asked: Sequence[Any]) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if kind in asked or kind == ALWAYS)


def _read(home: Home, raw: dict[str, Any]) -> Draft:
    remarks: list[str] = []
    name = raw.get("preset")
    try:
        if not isinstance(name, str):
            raise NotFound("The draft names no preset.")
        base = _of_preset(home, name)
    except KatherineError as error:
        begun = default(home)
        remarks.append(f"{error} The draft is compared with {begun.preset} instead.")
        name, base = begun.preset, begun.values
    written = raw["values"] if isinstance(raw.get("values"), dict) else {}
    values = {}
    for kind, model in KINDS.items():
        given = written.get(kind)
        made, given_up = recipe.mend(model, given if isinstance(given, dict) else {}, model.model_validate(base[kind]))
        values[kind] = made.model_dump(mode="json")
        remarks += [f"{kind}: {reason} It was left out." for reason in given_up]
    stages = raw.get("stages")
    dataset = raw.get("dataset")
    if not (isinstance(dataset, str) and (home.datasets / dataset / "report.json").is_file()):
        if dataset:
            remarks.append(f"The dataset {dataset} is gone: choose another.")
        dataset = None
    run = raw.get("run")
    return Draft(
        dataset,
        name,
        values,
        _stages(stages) if isinstance(stages, list) else tuple(KINDS),
        run if isinstance(run, str) else None,
        tuple(remarks),
    )
