"""The recipe tab through Gradio's own machinery: what is typed is kept as it is typed, what is wrong is said and not
kept, and a page that is opened shows what is on disk."""

import copy
import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from counted import write_dataset
from visitor import Visitor

from katherine import drafts, estimate, presets, prices, recipe, runs
from katherine.settings import Home
from ui import recipe as tab
from ui.panel import Panel

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.root.mkdir()
    return found


@pytest.fixture
def dataset(home: Home) -> str:
    """The counts and lengths of the corpus that the k0 recipe was derived on."""
    write_dataset(home, "k0-12ab")
    drafts.use_preset(home, "k0")
    drafts.change(home, dataset="k0-12ab")
    return "k0-12ab"


class Page(Visitor):
    def __init__(self, home: Home, drawn: bool = True):
        super().__init__(tab, Panel.of(home))
        if drawn:
            self.refresh()

    def at(self, name: str) -> Any:
        """The component with that id, such as sft-lora_r."""
        (found,) = (block for block in self.page.blocks.values() if getattr(block, "elem_id", None) == name)
        return found

    def type(self, name: str, value: Any) -> None:
        self.choose(self.at(name), value, "input")

    def overtaken(self, name: str, value: Any) -> None:
        """The value is typed, and what the page asks for next is answered before that is."""
        sent = copy.deepcopy(self.shows)
        self.shows[self.at(name)._id]["value"] = value
        self.refresh()
        here, self.shows = self.shows, sent
        before = copy.deepcopy(sent)
        self.type(name, value)
        answered, self.shows = self.shows, here
        for key, shown in answered.items():
            news = {what: each for what, each in shown.items() if each != before[key].get(what)}
            # What was typed is not the answer's doing.
            self.shows[key] |= {} if key == self.at(name)._id and news.keys() == {"value"} else news

    def settle(self) -> None:
        """What the page does by itself when the answer to an edit or a drawing has come."""
        for function in list(self.page.fns.values()):
            block, event = next(iter(function.targets), (None, ""))
            if event == "change":
                self.fire(self.page.blocks[block], event)

    def holds(self, name: str) -> Any:
        return self.value(self.at(name))

    def wrong(self) -> list[str]:
        """The fields that are marked, by their id."""
        return [
            block.elem_id
            for key, block in self.page.blocks.items()
            if "k-wrong" in (self.shows[key].get("elem_classes") or [])
        ]

    def says(self, name: str) -> str:
        return self.shows[self.at(name)._id]["info"]


def differing(home: Home) -> dict[str, Any]:
    """What differs from the preset, as stage.field: value."""
    return {f"{each.kind}.{each.about.name}": each.yours for each in drafts.differences(home, drafts.load(home))}


def test_a_page_that_is_opened_shows_what_is_on_disk(home, dataset):
    page = Page(home)
    drafts.set_recipe(home, "sft", drafts.load(home).values["sft"] | {"learning_rate": 5e-6, "lora_r": 32})
    page.refresh()
    assert (page.holds("sft-learning_rate"), page.holds("sft-lora_r")) == ("5e-6", 32)
    assert page.holds("sft-target_modules") == list(recipe.ATTENTION_AND_MLP)
    assert f"<b>{dataset}</b>" in page.html() and "1,886 conversations, 180 pairs" in page.html()


def test_a_change_is_kept_as_it_is_made_and_another_page_shows_it(home, dataset):
    page = Page(home)
    page.type("sft-learning_rate", "5e-6")
    page.type("dpo-beta", "0.3")
    page.type("export-quants", ["q8_0", "iq4_xs"])
    assert drafts.load(home).recipe("sft").learning_rate == 5e-6
    assert drafts.load(home).recipe("dpo").beta == 0.3
    other = Page(home)
    assert other.holds("export-quants") == ["q8_0", "iq4_xs"]


def test_a_wrong_value_is_said_beside_its_field_and_not_kept_while_the_others_are(home, dataset):
    page = Page(home)
    page.type("sft-num_train_epochs", 900)
    page.type("sft-learning_rate", "fast")
    page.type("sft-seed", 7)
    assert set(page.wrong()) == {"sft-num_train_epochs", "sft-learning_rate"}
    assert page.says("sft-learning_rate").startswith("Learning rate is 'fast'")
    assert "Not kept: Epochs (passes), Learning rate." in page.html()
    sft = drafts.load(home).recipe("sft")
    assert (sft.num_train_epochs, sft.learning_rate, sft.seed) == (3, 1e-4, 7)
    page.type("sft-num_train_epochs", 3)
    page.type("sft-learning_rate", "1e-4")
    assert page.wrong() == [] and "Not kept" not in page.html()
    assert page.says("sft-learning_rate").startswith("Steadier than")


def test_values_that_do_not_fit_each_other_are_kept_once_they_do(home, dataset):
    page = Page(home)
    page.type("sft-lora_r", 8)
    assert "lora_alpha 128 is more than 8" in page.html()
    assert drafts.load(home).recipe("sft").lora_r == 64
    page.type("sft-lora_alpha", 16)
    sft = drafts.load(home).recipe("sft")
    assert (sft.lora_r, sft.lora_alpha) == (8, 16) and "Not kept" not in page.html()


def test_a_page_left_open_does_not_undo_what_another_one_changed(home, dataset):
    old, new = Page(home), Page(home)
    new.type("sft-lora_r", 32)
    old.fire(old.at("sft-learning_rate"), "blur")
    assert drafts.load(home).recipe("sft").lora_r == 32
    old.type("sft-seed", 3)
    assert (drafts.load(home).recipe("sft").lora_r, drafts.load(home).recipe("sft").seed) == (32, 3)


def test_what_is_typed_before_anything_was_drawn_is_all_that_is_kept(home, dataset):
    drafts.use_preset(home, "demo")
    page = Page(home, drawn=False)
    page.type("sft-num_train_epochs", 1)
    assert differing(home) == {"sft.num_train_epochs": 1}
    assert page.holds("sft-per_device_batch_size") == 2 and "out of date" in page.html()


def test_an_edit_of_a_form_that_another_preset_has_replaced_keeps_nothing_else(home, dataset):
    page = Page(home)
    drafts.use_preset(home, "demo")
    page.overtaken("sft-num_train_epochs", 1)
    assert differing(home) == {"sft.num_train_epochs": 1}
    page.settle()
    assert (page.holds("sft-num_train_epochs"), page.holds("sft-per_device_batch_size")) == (1, 2)
    drafts.use_preset(home, "k0")
    page.type("sft-seed", 3)
    assert differing(home) == {"sft.seed": 3}


def test_an_old_page_shows_what_another_one_changed_once_it_is_typed_in(home, dataset):
    old, new = Page(home), Page(home)
    new.type("sft-lora_r", 128)
    new.choose(new.find(label="Preset"), "all-linear", "input")
    new.type("sft-num_train_epochs", 2)
    old.type("sft-learning_rate", "fast")
    assert differing(home) == {"sft.num_train_epochs": 2}
    assert (old.holds("sft-num_train_epochs"), old.holds("sft-learning_rate")) == (2, "fast")
    assert old.value(old.find(label="Preset")) == "all-linear"
    assert old.wrong() == ["sft-learning_rate"] and "Not kept: Learning rate." in old.html()
    assert "out of date" in old.html()
    old.type("sft-learning_rate", "0.0002")
    assert differing(home) == {"sft.num_train_epochs": 2, "sft.learning_rate": 2e-4}
    old.fire(old.at("sft-learning_rate"), "blur")
    assert old.holds("sft-learning_rate") == "0.0002" and "out of date" not in old.html()


def test_what_is_wrong_stays_until_another_draft_is_drawn_and_that_is_said(home, dataset):
    page = Page(home)
    page.type("sft-learning_rate", "fast")
    page.refresh()
    assert page.wrong() == ["sft-learning_rate"] and page.holds("sft-learning_rate") == "fast"
    drafts.use_preset(home, "demo")
    page.refresh()
    assert page.wrong() == [] and page.holds("sft-learning_rate") == "0.001"
    assert "Not kept: Learning rate." in page.html() and "out of date" in page.html()


def test_a_stage_that_is_off_is_hidden_and_not_started(home, dataset):
    page = Page(home)
    page.type("export-on", False)
    assert drafts.load(home).stages == ("sft", "dpo")
    assert (page.holds("export-on"), page.holds("probe-on")) == (False, False)
    page.type("probe-on", True)
    assert drafts.load(home).stages == ("sft", "dpo", "export", "probe")


def test_choosing_a_preset_sets_every_field_and_what_differs_is_listed_with_its_reason(home, dataset):
    page = Page(home)
    page.choose(page.find(label="Preset"), "all-linear", "input")
    assert "in_proj_qkv" in page.holds("sft-target_modules") and "The attention of 32 of 32 layers" in page.html()
    table = page.find(style="k-differs")
    assert page.rows(table) == []
    page.type("dpo-learning_rate", "2e-6")
    ((field, yours, theirs, reason),) = page.rows(table)
    assert (field, yours, theirs) == ("DPO: Learning rate", "2e-6", "5e-6") and "the voice is forgotten" in reason
    with pytest.raises(gr.Error, match="no preset"):
        page.choose(page.find(label="Preset"), EVIL, "input")


def test_a_past_run_is_listed_and_its_recipe_taken(home, dataset):
    run = runs.create(home, "sft", recipe=recipe.SftRecipe(lora_r=16).model_dump(mode="json"), who="test")
    page = Page(home)
    chooser = page.find(label="Load from a run")
    ((label, value),) = page.shows[chooser._id]["choices"]
    assert label.startswith("SFT, 20") and label.endswith("queued") and value == run.id
    page.choose(chooser, run.id, "input")
    assert page.holds("sft-lora_r") == 16 and drafts.load(home).run == run.id


def test_a_preset_is_saved_listed_and_deleted_and_the_built_in_ones_are_safe(home, dataset):
    page = Page(home)
    page.type("sft-seed", 5)
    page.shows[page.at("preset-name")._id]["value"] = "mine"
    page.fire(page.button("Save"), "click")
    assert drafts.load(home).preset == "mine" and page.rows(page.find(style="k-differs")) == []
    assert ["mine", "mine"] in page.shows[page.find(label="Preset")._id]["choices"]
    page.fire(page.button("Delete"), "click")
    assert "mine" not in recipe.preset_names(home)
    for name, button in (("k0", "Save"), ("k0", "Delete"), (EVIL, "Save")):
        page.shows[page.at("preset-name")._id]["value"] = name
        with pytest.raises(gr.Error) as caught:
            page.fire(page.button(button), "click")
        assert "<img" not in str(caught.value)


def test_recipes_are_pasted_as_json_and_a_wrong_one_changes_nothing(home, dataset):
    page = Page(home)
    paste = page.at("recipe-paste")
    page.shows[paste._id]["value"] = '{"sft": {"lora_r": 48}, "dpo": {"beta": 99}}'
    with pytest.raises(gr.Error, match="beta is 99"):
        page.fire(page.button("Use this JSON"), "click")
    assert drafts.load(home).recipe("sft").lora_r == 64
    page.shows[paste._id]["value"] = '{"sft": {"lora_r": 48}}'
    page.fire(page.button("Use this JSON"), "click")
    assert (page.holds("sft-lora_r"), page.value(paste)) == (48, "")
    shown = page.value(page.find(gr.Code))
    assert json.loads(shown)["sft"]["lora_r"] == 48


def test_the_estimate_follows_what_is_typed(home, dataset):
    page = Page(home)
    assert "SFT: 177 optimiser steps." in page.html() and "H200 SXM" in page.html()
    page.type("sft-num_train_epochs", 2)
    assert "SFT: 118 optimiser steps." in page.html()
    page.type("sft-fit", False)
    page.type("sft-gradient_checkpointing", False)
    page.type("sft-per_device_batch_size", 64)
    assert "It does not fit" in page.html()


def test_without_a_dataset_the_page_says_what_to_do_and_gives_no_time(home):
    page = Page(home)
    assert "No dataset is chosen: choose one on the Dataset tab." in page.html()
    assert "optimiser steps." not in page.html()


def test_a_price_is_entered_dated_and_taken_back(home, dataset):
    page = Page(home)
    page.shows[page.at("price-kind")._id]["value"] = "H200 SXM"
    page.choose(page.at("price-dollars"), "3.79", "submit")
    assert prices.listed(home)["H200 SXM"].dollars == 3.79 and "$3.79 an hour" in page.html()
    page.shows[page.at("price-dollars")._id]["value"] = EVIL
    with pytest.raises(gr.Error) as caught:
        page.fire(page.button("Enter"), "click")
    assert "&lt;img" in str(caught.value)
    page.fire(page.button("Take it back"), "click")
    assert "$3.99 an hour" in page.html()
    page.fire(page.find(column="$ an hour#"), "select", id="H100 PCIe")
    assert (page.holds("price-kind"), page.holds("price-dollars")) == ("H100 PCIe", "2.49")


def test_what_is_typed_never_becomes_markup(home, dataset):
    page = Page(home)
    page.type("sft-base", EVIL)
    page.type("sft-learning_rate", EVIL)
    assert drafts.load(home).recipe("sft").base == EVIL
    assert "<img" not in page.html() and "&lt;img" in page.html()


def test_a_damaged_price_list_is_said_and_the_forms_still_work(home, dataset):
    prices.path(home).write_text("{")
    page = Page(home)
    assert "prices.json" in page.html()
    page.type("sft-seed", 8)
    assert drafts.load(home).recipe("sft").seed == 8


def test_what_could_not_be_kept_of_an_older_draft_is_said(home, dataset):
    raw = json.loads(drafts.path(home).read_text())
    raw["values"]["sft"]["packing"] = EVIL
    drafts.path(home).write_text(json.dumps(raw))
    assert "packing is not a field" in Page(home).html()


def test_a_saved_preset_that_is_damaged_is_said_and_the_page_still_opens(home, dataset):
    presets.save(home, "mine", drafts.load(home).values)
    drafts.change(home, preset="mine")
    recipe.saved_preset(home, "mine").write_text("[]")
    assert "mine.json" in Page(home).html()


def test_the_card_shows_the_present_machine_first(home, dataset):
    plan = estimate.plan(home, drafts.load(home))
    assert plan.estimates[0].machine.here
    card = str(tab.card(plan))
    assert card.index("(this machine)") < card.index("H200 SXM") < card.index("H100 PCIe")
