"""Recipes: the k0 values, every reason at once, and step counts as the trainers make them."""

import pytest

from katherine import recipe
from katherine.errors import NotFound, RecipeError
from katherine.recipe import DpoRecipe, ExportRecipe, SftRecipe


def test_k0_predicts_the_known_step_counts():
    assert recipe.preset("k0", SftRecipe).steps(1886) == 177
    dpo = recipe.preset("k0", DpoRecipe)
    assert (dpo.steps_by_arithmetic(180), dpo.steps(180)) == (45, 46)
    assert "46 optimiser steps, not 45" in dpo.steps_explained(180)


def test_every_reason_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        recipe.make(
            SftRecipe,
            {"lora_r": 0, "learning_rate": "fast", "lora_rank": 8, "average_checkpoints": 3, "ema_decay": 0.9},
        )
    reasons = caught.value.reasons
    assert len(reasons) == 4
    for part in ("lora_r is 0", "learning_rate is 'fast'", "lora_rank is not a field", "average_checkpoints and ema"):
        assert any(part in reason for reason in reasons), part


def test_every_field_says_its_reason_and_source():
    for model in recipe.KINDS.values():
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            assert field.description and extra["source"], f"{model.__name__}.{name}"


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_are_sound_and_survive_json(name):
    for model in (SftRecipe, DpoRecipe, ExportRecipe):
        made = recipe.preset(name, model)
        assert model.model_validate_json(made.model_dump_json()) == made


def test_all_linear_differs_from_k0_only_in_its_targets():
    changed = recipe.differences(recipe.preset("all-linear", SftRecipe), recipe.preset("k0", SftRecipe))
    assert list(changed) == ["target_modules"]


def test_a_held_out_share_lowers_the_steps():
    held = recipe.preset("k0", SftRecipe, {"held_out": 0.1})
    assert held.trained_on(100) == 90
    assert held.steps(1886) < 177


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(NotFound, match="k0-bf16"):
        recipe.preset("k1", SftRecipe)
    with pytest.raises(NotFound, match="export"):
        recipe.load("bake", {})


def test_a_path_is_made_absolute_where_it_is_given_and_a_name_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mybase").mkdir()
    (tmp_path / "katherine").mkdir()
    (tmp_path / "mine.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert recipe.make(SftRecipe, {"base": "mybase"}).base == str(tmp_path / "mybase")
    assert recipe.make(SftRecipe, {"base": "Qwen/Qwen3.5-9B"}).base == "Qwen/Qwen3.5-9B"
    assert recipe.load("probe", {"probes": "mine.toml"}).probes == str(tmp_path / "mine.toml")
    assert recipe.load("probe", {"probes": "katherine"}).probes == "katherine"
