"""The draft: what is about to be started, kept in one file that survives everything, and presets saved from it."""

import json
import threading
from dataclasses import replace

import pytest

from katherine import drafts, presets, recipe, runs
from katherine.errors import DataError, NotFound, RecipeError
from katherine.recipe import DpoRecipe, SftRecipe
from katherine.settings import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def dataset(home):
    folder = home.datasets / "k0-12ab"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    return folder.name


def test_without_a_file_and_a_gpu_the_draft_is_the_demo_whole_and_complete(home):
    draft = drafts.load(home)
    assert (draft.dataset, draft.preset, draft.stages) == (None, "demo", ("sft", "dpo", "export", "probe"))
    assert draft.recipe("sft") == recipe.preset("demo", SftRecipe)
    assert set(draft.values["sft"]) == set(SftRecipe.model_fields)
    assert not drafts.path(home).exists()


def test_a_card_whose_driver_does_not_answer_is_still_for_k0(home, monkeypatch):
    from katherine import gpu
    from katherine.errors import SetupError

    def unwell():
        raise SetupError("the driver does not answer")

    monkeypatch.setattr(gpu, "read", unwell)
    assert drafts.load(home).preset == "k0"


def test_a_draft_comes_back_as_it_was_saved(home, dataset):
    saved = drafts.save(home, replace(drafts.load(home), dataset=dataset, stages=("sft", "export")))
    assert drafts.load(home) == saved
    assert saved.asked()["dpo"] is None and saved.asked()["sft"] == saved.values["sft"]


def test_an_invalid_value_stays_out_of_the_file_and_every_reason_is_said(home):
    before = drafts.save(home, drafts.load(home))
    wrong = {"sft": before.values["sft"] | {"lora_r": 0}, "dpo": before.values["dpo"] | {"beta": -1}}
    with pytest.raises(RecipeError) as caught:
        drafts.save(home, replace(before, values=before.values | wrong))
    assert [reason.split(" is ")[0] for reason in caught.value.reasons] == ["sft: lora_r", "dpo: beta"]
    assert drafts.load(home) == before


def test_one_stage_is_set_without_touching_the_others_and_wrong_fields_are_named(home):
    values = drafts.load(home).values
    drafts.set_recipe(home, "dpo", values["dpo"] | {"beta": 0.3})
    assert drafts.load(home).recipe("dpo").beta == 0.3
    assert drafts.load(home).values["sft"] == values["sft"]
    with pytest.raises(RecipeError) as caught:
        drafts.set_recipe(home, "dpo", values["dpo"] | {"beta": "warm", "seed": -1})
    assert set(caught.value.fields) == {"beta", "seed"}


def test_of_changes_to_a_stage_the_sound_ones_are_kept_unless_they_do_not_fit_each_other(home):
    drafts.use_preset(home, "k0")
    done = drafts.edit(home, "sft", {"seed": 7, "learning_rate": "fast", "num_train_epochs": "2"})
    assert done.draft == drafts.load(home) and set(done.kept) == {"seed", "num_train_epochs"}
    assert set(done.wrong) == {"learning_rate"} and done.conflicts == ()
    assert (done.draft.recipe("sft").seed, done.draft.recipe("sft").num_train_epochs) == (7, 2)
    done = drafts.edit(home, "sft", {"lora_r": 8, "seed": 8, "learning_rate": "fast"})
    assert done.kept == () and set(done.wrong) == {"learning_rate"} and "lora_alpha 128" in done.conflicts[0]
    assert done.draft == drafts.load(home) and done.draft.recipe("sft").seed == 7
    with pytest.raises(NotFound):
        drafts.edit(home, "bake", {"seed": 1})


def test_no_change_writes_nothing(home):
    assert drafts.edit(home, "sft", {}).draft.preset == "demo"
    assert drafts.edit(home, "sft", {"seed": "late"}).kept == ()
    assert not drafts.path(home).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_damaged_file_gives_the_default_and_says_so(home, text):
    home.root.mkdir()
    drafts.path(home).write_text(text)
    draft = drafts.load(home)
    assert draft.values == drafts.default(home).values
    assert "draft.json was damaged" in draft.remarks[0]


def test_what_an_older_version_wrote_is_kept_as_far_as_it_is_known_and_sound(home):
    drafts.save(home, drafts.load(home))
    raw = json.loads(drafts.path(home).read_text())
    raw["values"]["sft"] |= {"packing": True, "lora_r": 9999, "num_train_epochs": 7}
    del raw["values"]["sft"]["seed"]
    raw["values"]["bake"] = {}
    raw["stages"] = ["bake", "probe"]
    drafts.path(home).write_text(json.dumps(raw))
    draft = drafts.load(home)
    sft = draft.recipe("sft")
    assert (sft.num_train_epochs, sft.lora_r, sft.seed) == (7, recipe.preset("demo", SftRecipe).lora_r, 20)
    assert draft.stages == ("sft", "probe")
    assert any("packing" in remark for remark in draft.remarks) and any("lora_r" in r for r in draft.remarks)
    assert drafts.save(home, draft).remarks == () and drafts.load(home).remarks == ()


def test_a_dataset_that_is_gone_is_named_and_left_out(home, dataset):
    drafts.change(home, dataset=dataset)
    (home.datasets / dataset / "report.json").unlink()
    draft = drafts.load(home)
    assert draft.dataset is None and dataset in draft.remarks[0]


def test_stages_that_need_each_other_come_and_go_together(home):
    assert drafts.set_stage(home, "export", False).stages == ("sft", "dpo")
    assert drafts.set_stage(home, "probe", True).stages == ("sft", "dpo", "export", "probe")
    assert drafts.set_stage(home, "sft", False).stages == ("sft", "dpo", "export", "probe")


def test_a_change_beside_a_change_of_preset_brings_nothing_of_the_former_one(home):
    drafts.use_preset(home, "k0")
    running = threading.Event()

    def set_seeds():
        for seed in range(60):
            drafts.edit(home, "dpo", {"seed": seed})
        running.set()

    writer = threading.Thread(target=set_seeds)
    writer.start()
    turn = 0
    while not running.is_set():
        turn += 1
        drafts.use_preset(home, ("k0", "demo")[turn % 2])
        found = drafts.differences(home, drafts.load(home))
        assert {each.about.name for each in found} <= {"seed"}
    writer.join()


def test_two_writers_at_once_lose_neither_change(home, dataset):
    def set_seeds():
        for seed in range(30):
            drafts.set_recipe(home, "dpo", drafts.load(home).values["dpo"] | {"seed": seed})

    def set_datasets():
        for _ in range(30):
            drafts.change(home, dataset=dataset)

    threads = [threading.Thread(target=work) for work in (set_seeds, set_datasets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (drafts.load(home).dataset, drafts.load(home).recipe("dpo").seed) == (dataset, 29)


def test_saving_what_is_there_already_leaves_the_file_alone(home):
    drafts.save(home, drafts.load(home))
    before = drafts.path(home).stat().st_ino
    drafts.save(home, drafts.load(home))
    assert drafts.path(home).stat().st_ino == before


def test_a_past_runs_recipe_comes_with_those_it_was_built_on(home, dataset):
    sft = runs.create(home, "sft", recipe={"lora_r": 16, "lora_alpha": 32}, who="test")
    dpo = runs.create(home, "dpo", recipe={"beta": 0.4, "gone_by_now": 1}, who="test", parent=sft.id)
    drafts.change(home, dataset=dataset)
    draft = drafts.use_run(home, dpo.id)
    assert (draft.recipe("sft").lora_r, draft.recipe("dpo").beta, draft.run) == (16, 0.4, dpo.id)
    assert (draft.dataset, draft.preset) == (dataset, "demo")
    assert "gone_by_now" in draft.remarks[0]
    assert drafts.load(home).values == draft.values
    with pytest.raises(NotFound):
        drafts.use_run(home, "20260101-000000-sft-abcdef")


def test_what_differs_from_the_preset_is_told_with_the_presets_value_and_reason(home):
    drafts.use_preset(home, "k0")
    drafts.set_recipe(home, "sft", drafts.load(home).values["sft"] | {"lora_r": 32})
    (found,) = drafts.differences(home, drafts.load(home))
    assert (found.kind, found.about.label, found.yours, found.theirs) == ("sft", "LoRA rank", 32, 64)
    assert "128 overfits" in found.about.reason


def test_a_saved_preset_is_read_by_name_like_a_built_in_one(home):
    values = drafts.use_preset(home, "k0").values
    presets.save(home, "mine", values | {"dpo": values["dpo"] | {"beta": 0.2}})
    assert recipe.preset_names(home) == [*recipe.PRESETS, "mine"]
    assert recipe.preset("mine", DpoRecipe, home=home).beta == 0.2
    assert recipe.preset("mine", DpoRecipe, {"beta": 0.5}, home).beta == 0.5
    assert drafts.use_preset(home, "mine").recipe("dpo").beta == 0.2
    with pytest.raises(NotFound, match="the presets are k0"):
        recipe.preset("mine", DpoRecipe)
    presets.delete(home, "mine")
    draft = drafts.load(home)
    assert draft.recipe("dpo").beta == 0.2 and "no preset 'mine'" in draft.remarks[0]


@pytest.mark.parametrize("name", ["", "k0", "../up", "a/b", ".hidden", "x" * 49, "two words", "a\n"])
def test_a_name_that_cannot_be_a_presets_is_refused_and_nothing_is_written(home, name):
    with pytest.raises(RecipeError):
        presets.save(home, name, {})
    assert not (home.root / "presets").exists()


def test_built_in_presets_cannot_be_deleted_nor_can_what_is_not_there(home):
    with pytest.raises(RecipeError, match="built-in"):
        presets.delete(home, "k0")
    for name in ("nobody", "../draft"):
        with pytest.raises(NotFound):
            presets.delete(home, name)


def test_a_damaged_saved_preset_is_named(home):
    presets.save(home, "mine", {})
    recipe.saved_preset(home, "mine").write_text("[]")
    with pytest.raises(DataError, match=r"mine\.json"):
        recipe.preset("mine", SftRecipe, home=home)


def test_recipes_go_out_as_json_and_come_back_the_same(home):
    drafts.use_preset(home, "all-linear")
    text = drafts.to_json(drafts.load(home))
    drafts.use_preset(home, "demo")
    assert drafts.paste(home, text).values == recipe_values(home, "all-linear")


def recipe_values(home, name):
    return {kind: recipe.preset(name, model, home=home).model_dump(mode="json") for kind, model in recipe.KINDS.items()}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "one JSON object"),
        ("{}", "one JSON object"),
        ("[" * 100_000, "too deeply"),
        ('{"sft": {"seed": 1}, "sft": {}}', "there twice"),
        ('{"bake": {}}', "no stage 'bake'"),
        ('{"sft": 3}', "not an object"),
        ('{"sft": {"lora_rank": 3}}', "lora_rank is not a field"),
        ('{"sft": {"learning_rate": NaN}}', "learning_rate is nan"),
        ('{"sft": {"seed": ' + "9" * 5000 + "}}", "not JSON"),
    ],
)
def test_pasted_text_that_is_no_recipe_is_refused_in_words_and_changes_nothing(home, text, says):
    before = drafts.save(home, drafts.load(home))
    with pytest.raises(RecipeError, match=says):
        drafts.paste(home, text)
    assert drafts.load(home) == before
