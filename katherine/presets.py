"""Recipes of all stages kept under a name, as one JSON file each in KATHERINE_HOME/presets. Reading one by its name,
built-in or saved, is recipe.preset's business."""

import re
from collections.abc import Mapping
from typing import Any

from katherine import recipe
from katherine.errors import NotFound, RecipeError
from katherine.runs import now, write_json
from katherine.settings import Home

# Fits a file's name and a command line without quotes, and is short enough for a list.
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,47}")


def save(home: Home, name: str, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps recipes by kind, complete, so that later defaults do not change them. A saved preset of that name is
    replaced. Raises RecipeError for a name that cannot be, or is a built-in's, and for values that cannot work."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            [f"{name!r} cannot name a preset: up to 48 letters, digits, dots, - and _, a letter or digit first."]
        )
    if name in recipe.PRESETS:
        raise RecipeError([f"{name} is a built-in preset and stays as it is: choose another name."])
    whole: dict[str, Any] = {"saved": now()}
    reasons: list[str] = []
    for kind in recipe.KINDS:
        try:
            whole[kind] = recipe.load(kind, dict(values.get(kind, {}))).model_dump(mode="json")
        except RecipeError as error:
            reasons += [f"{kind}: {reason}" for reason in error.reasons]
    if reasons:
        raise RecipeError(reasons)
    path = recipe.saved_preset(home, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, whole)


def delete(home: Home, name: str) -> None:
    """Raises RecipeError for a built-in preset, NotFound for a name that is none."""
    if name in recipe.PRESETS:
        raise RecipeError([f"{name} is a built-in preset and cannot be deleted."])
    if name not in recipe.preset_names(home):
        raise NotFound(f"There is no saved preset {name!r}.")
    recipe.saved_preset(home, name).unlink(missing_ok=True)
