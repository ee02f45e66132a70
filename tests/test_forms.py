"""Forms: every recipe to the page and back without a loss, everything said about a field taken from its model."""

import math
import random
from typing import ClassVar, Literal

import gradio as gr
import pytest

from katherine import recipe
from katherine.errors import RecipeError
from katherine.recipe import KINDS, Recipe
from ui.forms import Form, shown, written


def form(model: type[Recipe]) -> Form:
    with gr.Blocks():
        return Form(model)


def to_the_page_and_back(form: Form, made: Recipe) -> Recipe:
    """As Gradio carries it: each component's own post- and preprocessing."""
    updates = form.show(made.model_dump(mode="json"))
    given = []
    for control in form.components:
        sent = control.postprocess(updates[control]["value"])
        given.append(control.preprocess(getattr(sent, "root", sent)))
    return recipe.make(form.model, form.values(given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_every_preset_survives_the_page(kind, preset):
    made = recipe.preset(preset, KINDS[kind])
    assert to_the_page_and_back(form(KINDS[kind]), made) == made


@pytest.mark.parametrize("seed", range(40))
def test_any_recipe_survives_the_page_to_the_last_bit(seed):
    draw = random.Random(seed)
    values = {
        "learning_rate": 10 ** draw.uniform(-12, -2.001),
        "warmup_ratio": draw.uniform(0, 0.5),
        "weight_decay": draw.random(),
        "max_grad_norm": draw.uniform(1e-9, 100),
        "num_train_epochs": draw.randint(1, 50),
        "seed": draw.randint(0, 2**31 - 1),
        "gradient_checkpointing": draw.random() < 0.5,
        "lr_scheduler_type": draw.choice(["cosine", "linear", "constant_with_warmup"]),
        "base": draw.choice(["a/b", "./<i>folder</i>", "smollm2-135m"]),
        "target_modules": draw.sample(["q_proj", "mine", "k_proj", "out_proj"], draw.randint(1, 4)),
    }
    made = recipe.make(recipe.SftRecipe, values)
    assert to_the_page_and_back(form(recipe.SftRecipe), made) == made


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-4, "1e-4"), (5e-6, "5e-6"), (2.5e-5, "2.5e-5"), (0.05, "0.05"), (0.0, "0"), (1.0, "1"), (100.0, "100")],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert written(value) == text and float(text) == value


def test_a_written_number_is_the_same_number():
    draw = random.Random(0)
    for _ in range(2000):
        value = math.ldexp(draw.random(), draw.randint(-60, 60))
        assert float(written(value)) == value


class Later(Recipe):
    """Fields of every sort, of a recipe that no page has ever heard of."""

    kind: ClassVar[str] = "later"

    warmth: float = recipe._field(0.5, "Half is mild.", "nobody", ge=0, le=2, unit="kelvin", first=True)
    rounds: int = recipe._field(3, "Three is company.", "a proverb", ge=1)
    quiet: bool = recipe._field(False, "Says nothing.", "nobody")
    voice: Literal["low", "high"] = recipe._field("low", "Low carries.", "nobody")
    names: tuple[str, ...] = recipe._field(("a",), "Who is asked.", "nobody", suggestions=("a", "b"), min_length=1)
    place: str = recipe._field("here", "Where.", "nobody", title="Place to be")


def test_a_field_that_is_added_to_a_model_is_on_the_form():
    made = form(Later)
    controls = {name: type(control) for name, control in made.controls.items()}
    assert controls == {
        "warmth": gr.Textbox,
        "rounds": gr.Number,
        "quiet": gr.Checkbox,
        "voice": gr.Dropdown,
        "names": gr.Dropdown,
        "place": gr.Textbox,
    }
    assert made.controls["warmth"].label == "Warmth (kelvin)"
    assert made.controls["warmth"].info == "Half is mild. From 0, up to 2."
    assert made.controls["rounds"].info == "Three is company. From 1. Source: a proverb."
    assert made.controls["place"].label == "Place to be"
    assert [value for _, value in made.controls["voice"].choices] == ["low", "high"]
    assert made.controls["names"].multiselect and made.controls["names"].allow_custom_value
    changed = Later(warmth=1e-7, rounds=9, quiet=True, voice="high", names=("b", "c"), place="<b>there</b>")
    assert to_the_page_and_back(made, changed) == changed


@pytest.mark.parametrize("model", KINDS.values())
def test_every_field_has_a_control_with_the_models_words(model):
    made = form(model)
    for about in recipe.about(model):
        control = made.controls[about.name]
        assert control.label == about.label and control.info.startswith(about.reason)
    assert list(made.controls) == list(model.model_fields)


def folded(block) -> bool:
    """Whether the block is inside an accordion."""
    while (block := block.parent) is not None:
        if isinstance(block, gr.Accordion):
            return True
    return False


def test_those_that_people_touch_first_stand_before_the_others():
    first = {kind: [each.name for each in recipe.about(model) if each.first] for kind, model in KINDS.items()}
    assert {"num_train_epochs", "learning_rate", "per_device_batch_size", "lora_r"} <= set(first["sft"])
    assert "beta" in first["dpo"] and "quants" in first["export"]
    made = form(recipe.DpoRecipe)
    inside = {name for name, control in made.controls.items() if folded(control)}
    assert inside == set(recipe.DpoRecipe.model_fields) - set(first["dpo"])


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("learning_rate", "fast", "valid number"),
        ("learning_rate", "", "valid number"),
        ("learning_rate", "nan", "finite number"),
        ("learning_rate", "1e999", "finite number"),
        ("num_train_epochs", 3.5, "fractional"),
        ("num_train_epochs", None, "valid integer"),
        ("num_train_epochs", 10**30, "less than or equal to 50"),
        ("target_modules", [], "at least 1"),
        ("target_modules", [["q_proj"]], "at least 1"),
        ("lr_scheduler_type", "wavy", "'cosine'"),
        ("base", "  ", "at least 1"),
    ],
)
def test_whatever_a_control_sends_is_judged_by_the_model_and_the_field_named(name, given, says):
    made = form(recipe.SftRecipe)
    defaults = made.shown(recipe.SftRecipe().model_dump(mode="json"))
    values = made.values([(defaults | {name: given})[each] for each in made.controls])
    with pytest.raises(RecipeError) as caught:
        recipe.make(recipe.SftRecipe, values)
    assert set(caught.value.fields) == {name} and says in caught.value.fields[name]
    marked = made.mark(caught.value.fields)
    wrong = [field for field, control in made.controls.items() if "k-wrong" in marked[control]["elem_classes"]]
    assert wrong == [name]
    assert marked[made.controls[name]]["info"].startswith(made.label(name))
    assert not any("value" in update for update in marked.values())


def test_only_what_a_person_changed_counts_as_edited():
    made = form(recipe.SftRecipe)
    before = made.shown(recipe.SftRecipe().model_dump(mode="json"))
    given = [(before | {"learning_rate": " 5e-5 ", "lora_r": 32})[name] for name in made.controls]
    assert made.edited(given, before) == {"learning_rate": "5e-5", "lora_r": 32}
    assert made.edited([before[name] for name in made.controls], before) == {}


def test_before_anything_is_drawn_a_form_holds_its_models_defaults():
    made = form(recipe.SftRecipe)
    assert made.unfilled == {name: control.value for name, control in made.controls.items()}
    assert made.unfilled == made.shown(recipe.SftRecipe().model_dump(mode="json"))


def test_a_type_without_a_control_is_a_bug_and_says_which_field():
    class Odd(Recipe):
        kind: ClassVar[str] = "odd"
        when: bytes = recipe._field(b"", "No control.", "nobody")

    with pytest.raises(TypeError, match=r"Odd\.when"):
        form(Odd)


def test_a_list_is_shown_as_a_list():
    assert shown(recipe.ExportRecipe, "quants", ("q4_k_m",)) == ["q4_k_m"]
