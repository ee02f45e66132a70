import json
from pathlib import Path

import pytest

from bench.past import write_past
from katherine import comparison, curves, history, manifests, outcomes, recipe, runs
from katherine.errors import DataError, KatherineError, NotFound
from katherine.history import History
from katherine.recipe import ExportRecipe
from katherine.runs import Run, State
from katherine.settings import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def made(home: Home, kind: str, parent: Run | None = None, **values: object) -> Run:
    whole = recipe.load(kind, dict(values)).model_dump(mode="json")
    return runs.create(home, kind, recipe=whole, who="test", parent=parent.id if parent else None)


def succeed(run: Run, **result: object) -> Run:
    runs.write_json(run.path / "result.json", result)
    run.set_status(state=State.succeeded, attempt=1)
    return run


def outcome(home: Home, run: Run) -> outcomes.Outcome:
    known = History(home)
    return known.outcome(known.get(run.id))


def rows(run: Run, *logged: dict[str, object]) -> None:
    (run.path / "metrics.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in logged))


# ------------------------------------------------------------------------------------------------------- outcomes


def test_a_training_run_is_told_by_its_losses_even_where_they_are_zero(home):
    run = succeed(made(home, "sft"), steps=3, first_loss=0.5, last_loss=0.0)
    found = outcome(home, run)
    assert (found.steps, found.last_loss) == (3, 0.0)
    assert found.words() == "loss 0.5 → 0"


def test_an_export_is_told_by_its_files_and_probes_by_what_the_files_passed(home):
    export = succeed(
        made(home, "export"),
        files=[
            {"quant": "q4_k_m", "bytes": 5_000_000_000, "accepted": True},
            {"quant": "q6_k", "bytes": 7_000_000_000, "accepted": False},
        ],
    )
    assert outcome(home, export).words() == "1 of 2 files accepted, 12 GB"
    asked = {"base": {"asked": 4, "passed": 0}, "q4_k_m": {"asked": 26, "passed": 23}}
    probe = succeed(made(home, "probe"), models=asked, answers={})
    found = outcome(home, probe)
    assert (found.asked, found.passed) == (26, 23)
    assert found.words() == "23 of 26 probes passed"


def test_a_run_that_did_not_succeed_is_told_by_the_last_row_it_logged(home):
    run = made(home, "sft")
    rows(run, {"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 2, "eval_loss": 1.0})
    run.set_status(state=State.failed, attempt=1)
    found = outcome(home, run)
    assert found.steps == 2 and found.last_loss is not None and found.last_loss != found.last_loss
    assert outcome(home, made(home, "sft")) == outcomes.Outcome()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"files": 3}', '{"models": {"q4": {}}}', "\udcff"])
def test_a_damaged_result_is_named_and_never_raises(home, content):
    run = made(home, "export")
    (run.path / "result.json").write_bytes(content.encode(errors="surrogateescape"))
    run.set_status(state=State.succeeded, attempt=1)
    assert "result.json is damaged" in outcome(home, run).words()
    known = History(home)
    assert outcomes.figures(run, known.get(run.id).status) == {}
    (run.path / "result.json").unlink()
    assert "result.json is gone" in outcome(home, run).words()


def test_an_outcome_is_read_again_only_when_the_runs_status_changed(home):
    run = made(home, "sft")
    known = History(home)
    assert known.outcome(known.runs()[0]).last_loss is None
    succeed(run, last_loss=0.25)
    assert known.outcome(known.runs()[0]).last_loss == 0.25
    runs.write_json(run.path / "result.json", {"last_loss": 9.0})
    assert known.outcome(known.runs()[0]).last_loss == 0.25


def test_children_are_those_that_build_directly_on_a_run(home):
    sft = made(home, "sft")
    first, second = made(home, "dpo", sft), made(home, "export", sft)
    made(home, "probe", second)
    assert [seen.id for seen in History(home).children(sft.id)] == [first.id, second.id]


# ----------------------------------------------------------------------------------------------------- comparison


def test_two_runs_differ_in_what_was_asked_and_are_equal_in_the_rest(home):
    one, other = made(home, "sft"), made(home, "sft", learning_rate=5e-5, lora_r=32)
    succeed(one, last_loss=0.5, steps=10)
    found = comparison.compare(History(home), one.id, other.id)
    assert {(pair.name, pair.a, pair.b) for pair in found.asked} == {
        ("sft.learning_rate", 1e-4, 5e-5),
        ("sft.lora_r", 64, 32),
    }
    assert found.equal == len(one.record.recipe) - 2
    assert found.versions == ()
    assert ("last_loss", 0.5, None) in [(pair.name, pair.a, pair.b) for pair in found.results]


def test_dataset_revision_and_versions_are_compared_too(home):
    one, other = made(home, "sft"), made(home, "sft")
    for run, changes in (
        (one, {"dataset": "a", "inputs": {"dataset": "11"}, "revision": "abc", "versions": {"trl": "1.14.2"}}),
        (other, {"dataset": "b", "inputs": {"dataset": "22"}, "revision": "abd", "versions": {"trl": "1.15.0"}}),
    ):
        raw = json.loads((run.path / "run.json").read_text())
        (run.path / "run.json").write_text(json.dumps(raw | changes))
    found = comparison.compare(History(home), one.id, other.id)
    assert [pair.name for pair in found.asked] == ["dataset", "dataset (sha256)", "revision"]
    assert [(pair.name, pair.a, pair.b) for pair in found.versions] == [("trl", "1.14.2", "1.15.0")]


def test_exports_are_compared_with_the_recipes_of_what_they_come_from(home):
    exports = []
    for rate in (1e-4, 2e-4):
        sft = made(home, "sft", learning_rate=rate)
        exports.append(made(home, "export", made(home, "dpo", sft)))
    found = comparison.compare(History(home), exports[0].id, exports[1].id)
    assert [pair.name for pair in found.asked] == ["parent", "sft.learning_rate"]


def test_runs_of_different_kinds_can_be_compared(home):
    sft = made(home, "sft")
    dpo = made(home, "dpo", sft)
    found = comparison.compare(History(home), sft.id, dpo.id)
    assert ("dpo.beta", None, 0.1) in [(pair.name, pair.a, pair.b) for pair in found.asked]
    assert not [pair for pair in found.asked if pair.name.startswith("sft.")]


def test_a_run_is_not_compared_with_itself_nor_with_none(home):
    run = made(home, "sft")
    with pytest.raises(KatherineError, match="with itself"):
        comparison.compare(History(home), run.id, run.id)
    with pytest.raises(NotFound):
        comparison.compare(History(home), run.id, "absent")


def test_the_nearest_preset_is_the_one_with_the_fewest_differences(home):
    values = recipe.preset("k0-bf16", recipe.SftRecipe, {"seed": 3}).model_dump(mode="json")
    run = runs.create(home, "sft", recipe=values, who="test")
    name, preset = comparison.nearest_preset(home, run.record)
    assert name == "k0-bf16"
    assert [key for key, value in run.record.recipe.items() if preset[key] != value] == ["seed"]
    assert comparison.nearest_preset(home, runs.create(home, "other", recipe={}, who="test").record) == ("", {})


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (True, "yes"), (False, "no"), (0, "0"), (0.0, "0"), (5e-5, "0.00005"), (1e-4, "0.0001"),
     (1e-12, "1e-12"), (50_000, "50,000"), (["q_proj", "k_proj"], "q_proj k_proj"), ("nan", "nan"),
     ({"a": 1}, '{"a": 1}')],
)  # fmt: skip
def test_values_are_said_as_a_person_writes_them(value, said):
    assert comparison.text(value) == said


def test_one_runs_facts_are_json(home):
    sft = succeed(made(home, "sft"), last_loss=0.0, steps=3)
    dpo = made(home, "dpo", sft)
    known = History(home)
    found = json.loads(json.dumps(comparison.facts(known, known.get(sft.id))))
    assert (found["state"], found["children"], found["figures"]) == (
        "succeeded",
        [dpo.id],
        {"last_loss": 0.0, "steps": 3},
    )


# ------------------------------------------------------------------------------------------------------ manifests


def test_a_manifest_is_read_as_export_writes_it_and_damage_is_named(home):
    *_, export, _ = write_past(home, runs=4, steps=20, datasets=1)
    found = manifests.read(export)
    assert [entry.quant for entry in found.files] == ["q4_k_m", "q5_k_m", "q6_k"]
    assert all(manifests.is_there(export, entry) for entry in found.files)
    assert found.unquantised.quant == "bf16" and found.unquantised.kl is None
    (export.out / "gguf" / found.files[0].file).write_bytes(b"cut")
    assert not manifests.is_there(export, found.files[0])
    (export.out / "gguf" / "manifest.json").write_text('{"files": []')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        manifests.read(export)
    (export.out / "gguf" / "manifest.json").unlink()
    with pytest.raises(NotFound, match="has not finished"):
        manifests.read(export)


def test_what_was_exported_before_counts_only_with_the_same_settings_and_while_it_is_there(home):
    _, dpo, export, _ = write_past(home, runs=4, steps=20, datasets=1)
    asked = export.record.recipe
    known = History(home)

    def before(**changes: object) -> set[str]:
        return set(manifests.made_before(known.runs(), dpo.id, asked | changes))

    assert before() == {"q4_k_m", "q5_k_m", "q6_k"}
    assert before(quants=["q5_k_m", "q8_0"]) == {"q5_k_m"}
    assert before(max_kl=0.5) == set()
    assert manifests.made_before(known.runs(), "another", asked) == {}
    (export.out / "gguf" / "qwen3.5-9b-q5_k_m.gguf").unlink()
    assert before() == {"q4_k_m", "q6_k"}


def test_room_is_reckoned_from_the_bases_shape_before_anything_is_loaded(home):
    sft, *_ = write_past(home, runs=4, steps=20, datasets=1)
    room = manifests.room(home, sft, ExportRecipe(quants=("q4_k_m", "q8_0")))
    assert room.sizes is not None and set(room.sizes) == {"q4_k_m", "q5_k_m", "q6_k", "q8_0"}
    # 8.95 B weights: 5.6 GB as q4_k_m, measured; the figure is from above.
    assert 5.6e9 < room.sizes["q4_k_m"] < 6.2e9
    assert room.fullest is not None and room.fullest > 2 * 2 * 8.9e9
    assert room.free > 0 and room.is_enough is (room.fullest <= room.free)
    (sft.out / "adapter" / "base.json").unlink()
    assert manifests.room(home, sft, ExportRecipe()).sizes is None


def test_only_what_was_trained_to_the_end_can_be_exported(home):
    sft, dpo = succeed(made(home, "sft")), made(home, "dpo")
    dpo.set_status(state=State.failed)
    succeed(made(home, "export", sft))
    assert [seen.id for seen in manifests.trained(History(home).runs())] == [sft.id]


# ------------------------------------------------------------------------------------------------------- the past


def test_a_written_past_is_read_by_everything_that_reads_real_runs(home):
    family = write_past(home, runs=40, steps=500, datasets=2)
    known = History(home)
    seen = {each.id: each for each in known.runs()}
    assert len(seen) == 40 and all(not each.damage for each in seen.values())
    assert all(not known.outcome(each).damage for each in seen.values())
    states = {each.status.state for each in seen.values()}
    assert states == {State.succeeded, State.failed, State.cancelled}
    steps = [len(curves.Reader(run.path / "metrics.jsonl").read().trained.steps) for run in family]
    assert max(steps) == 500
    for run in family:
        recipe.load(run.record.kind, run.record.recipe)
        if seen[run.id].kind == "export" and seen[run.id].status.state is State.succeeded:
            assert manifests.read(run).files
    assert history.History(home).under_way() == []
