import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from visitor import Visitor

from bench.past import write_past
from jobs import queue, slot
from katherine import drafts, runs
from katherine.runs import Run, State
from katherine.settings import Home
from ui import export
from ui.panel import Panel

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Its GPU slot is held by the test, so that what is queued is not carried out: exporting is tested elsewhere."""
    home = Home(tmp_path / "home")
    home.root.mkdir()
    with slot.take(home, "test"):
        yield home
        for run, _ in queue.unfinished(home):
            queue.stop(home, run.id, kill=True)


@pytest.fixture
def family(home) -> dict[str, Run]:
    return {run.record.kind: run for run in write_past(home, runs=4, steps=20, datasets=1)}


def visit(home: Home) -> Visitor:
    visitor = Visitor(export, Panel.of(home))
    visitor.refresh()
    return visitor


def exports(home: Home) -> list[Run]:
    return [run for run in runs.everyone(home) if run.record.kind == "export"]


def without_past_exports(home: Home, family: dict[str, Run]) -> None:
    """As after a training, before anything was exported."""
    for kind in ("export", "probe"):
        (family[kind].path / "run.json").unlink()


def use(home: Home, **values: object) -> None:
    drafts.set_recipe(home, "export", drafts.load(home).values["export"] | values)


def test_without_a_trained_run_the_page_says_what_to_do_and_offers_nothing(home):
    visitor = visit(home)
    assert "There is no trained run yet" in visitor.html()
    assert not [b for b in visitor.page.blocks.values() if isinstance(b, gr.Button) and visitor.visible(b)][1:]
    assert "Nothing has been exported yet" in visitor.value(visitor.find(column="Asked for"))["empty"]


def test_the_newest_trained_run_is_offered_with_a_button_for_each_quant_and_its_size(home, family):
    visitor = visit(home)
    assert visitor.value(visitor.find(label="Trained run to export")) == family["dpo"].id
    assert visitor.value(visitor.button("q4_k_m")) == "q4_k_m · about 5.88 GB"
    assert visitor.button("q5_k_m") and visitor.button("q6_k")
    assert visitor.value(visitor.button("All 3")).startswith("All 3 of the recipe · about 21")
    assert "Free" in visitor.html() and "Needs" in visitor.html()


def test_quants_that_the_recipe_names_get_buttons_too(home, family):
    use(home, quants=["q4_k_m", "q8_0"])
    visitor = visit(home)
    assert visitor.button("q8_0") and visitor.button("q6_k") and visitor.button("All 2")


def test_a_quants_button_starts_an_export_of_it_alone_with_the_drafts_settings(home, family):
    without_past_exports(home, family)
    use(home, check_examples=5)
    visitor = visit(home)
    visitor.fire(visitor.button("q6_k"), "click")
    (run,) = exports(home)
    assert run.record.parent == family["dpo"].id
    assert run.record.recipe["quants"] == ["q6_k"] and run.record.recipe["check_examples"] == 5
    assert run.record.dataset == family["dpo"].record.dataset
    assert f"<h3>{run.id}</h3>" in visitor.html()
    visitor.fire(visitor.button("q6_k"), "click")
    assert exports(home) == [run]


def test_the_button_for_all_starts_one_export_of_the_run_that_is_chosen(home, family):
    without_past_exports(home, family)
    visitor = visit(home)
    visitor.choose(visitor.find(label="Trained run to export"), family["sft"].id, "input")
    visitor.fire(visitor.button("All"), "click")
    (run,) = exports(home)
    assert run.record.parent == family["sft"].id
    assert run.record.recipe["quants"] == ["q4_k_m", "q5_k_m", "q6_k"]


def test_what_was_exported_before_is_said_and_made_again_only_on_a_second_word(home, family):
    use(home, **family["export"].record.recipe)
    visitor = visit(home)
    visitor.fire(visitor.button("q4_k_m"), "click")
    assert exports(home) == [family["export"]]
    name = family["export"].id.split("-", 2)[2]
    assert f"Already exported from this run with the same settings: q4_k_m by {name}." in visitor.html()
    visitor.fire(visitor.button("Leave it"), "click")
    assert not [b for b in visitor.page.blocks.values() if isinstance(b, gr.Group) and visitor.visible(b)]
    visitor.fire(visitor.button("q4_k_m"), "click")
    visitor.fire(visitor.button("Export again"), "click")
    assert len(exports(home)) == 2
    assert exports(home)[-1].record.recipe["quants"] == ["q4_k_m"]


def test_other_settings_are_another_export(home, family):
    use(home, **family["export"].record.recipe | {"max_kl": 0.1})
    visitor = visit(home)
    visitor.fire(visitor.button("q4_k_m"), "click")
    assert len(exports(home)) == 2


def test_a_type_that_cannot_be_made_is_refused_in_words(home, family):
    use(home, quants=["iq1_s"])
    visitor = visit(home)
    with pytest.raises(gr.Error, match="needs importance data"):
        visitor.fire(visitor.button("iq1_s"), "click")
    assert exports(home) == [family["export"]]


def test_an_export_under_way_shows_where_it_is_and_can_be_stopped_twice(home, family):
    without_past_exports(home, family)
    visitor = visit(home)
    visitor.fire(visitor.button("q4_k_m"), "click")
    (run,) = exports(home)
    assert "waits for its turn" in visitor.html() or "holds" in visitor.html() or "GPU" in visitor.html()
    ours = {"supervisor": 1, "machine": "another", "heartbeat": runs.now(), "started": runs.now(), "attempt": 1}
    run.set_status(state=State.running, phase="check q4_k_m", step=3, of=16, pid=1, **ours)
    visitor.refresh()
    assert "check q4_k_m, 3 of 16" in visitor.html()
    visitor.fire(visitor.button("Stop"), "click")
    assert queue.control(run).read_text() == "keep"
    run.set_status(state=State.stopping)
    visitor.refresh()
    visitor.fire(visitor.button("End it now"), "click")
    assert queue.control(run).read_text() == "kill"
    run.set_status(state=State.cancelled, reason="Stopped by you and killed.")
    visitor.refresh()
    assert "Stopped by you and killed." in visitor.html()
    assert not visitor.html().count("<progress")


def test_files_are_shown_with_what_they_passed_and_their_download(home, family):
    manifest = family["export"].out / "gguf" / "manifest.json"
    whole = json.loads(manifest.read_text())
    bad = whole["files"][1]
    bad["accepted"] = False
    bad["checks"][9] |= {"passed": False, "finding": "0.41 nats a token from the unquantised file (at most 0.25)"}
    manifest.write_text(json.dumps(whole))
    visitor = visit(home)
    files = visitor.value(visitor.find(column="SHA-256"))["rows"]
    assert [row[0] for row in files] == ["q4_k_m", "q5_k_m", "q6_k"]
    assert files[1][1] == {"t": "NO", "s": None, "c": "bad", "h": "", "w": ""}
    assert files[1][7]["t"] == bad["sha256"][:12] and files[1][7]["w"] == bad["sha256"]
    assert files[1][8]["h"] == f"/operator/files/runs/{family['export'].id}/gguf/{bad['file']}"
    assert f"{bad['sha256']}  {bad['file']}" in visitor.html()
    checks = visitor.rows(visitor.find(column="Finding"))
    assert checks[0] == ["FAILED", "kl", "q5_k_m", "0.41 nats a token from the unquantised file (at most 0.25)"]
    assert ["passed", "loads", "all", "an invented finding about loads"] in checks
    (family["export"].out / "gguf" / bad["file"]).unlink()
    visitor.refresh()
    gone = visitor.value(visitor.find(column="SHA-256"))["rows"][1][8]
    assert "is gone or changed" in gone["t"] and not gone["h"]


def test_probes_of_the_export_are_shown_with_the_answers_side_by_side(home, family):
    visitor = visit(home)
    models = [row[0] for row in visitor.rows(visitor.find(column="Model"))]
    assert models == ["base", "sft", "dpo", "q4_k_m", "q5_k_m", "q6_k"]
    answers = visitor.value(visitor.find(column="q4_k_m"))
    assert answers["columns"] == ["Question", *models]
    assert answers["rows"][0][:2] == ["Who are you?", "An invented answer of base."]
    family["probe"].set_status(state=State.failed)
    visitor.refresh()
    assert not visitor.visible(visitor.find(column="Model"))


def test_nothing_is_sent_again_while_nothing_changes(home, family):
    visitor = visit(home)
    assert visitor.refresh() == set()


@pytest.mark.parametrize("content", ["[", "{}", "null", "\udcff"])
def test_a_damaged_manifest_is_named_and_the_page_stays(home, family, content):
    (family["export"].out / "gguf" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    visitor = visit(home)
    assert "manifest.json is damaged" in visitor.html()
    assert visitor.rows(visitor.find(column="SHA-256")) == []


def test_a_failed_export_says_why_and_what_to_do(home, family):
    family["export"].set_status(state=State.failed, reason="The export needs 41 GB.", remedy="Remove old runs.")
    assert "The export needs 41 GB. Remove old runs." in visit(home).html()


def test_names_from_data_and_models_are_escaped_wherever_they_are_html(home, family):
    for name in ("run.json", "out/gguf/manifest.json", "result.json"):
        path = family["export"].path / name
        raw = json.loads(path.read_text())
        if name == "run.json":
            raw |= {"who": HOSTILE, "dataset": HOSTILE}
        else:
            raw["base"] = HOSTILE
            raw["seconds"] = {HOSTILE: 1.0}
            raw["files"][0]["file"] = HOSTILE.replace("/", "")
        path.write_text(json.dumps(raw))
    visitor = visit(home)
    assert "<img" not in visitor.html()
    assert visitor.html().count("&lt;img") >= 3


def test_a_made_up_run_is_refused(home, family):
    visitor = visit(home)
    for made_up in ("../../etc", HOSTILE):
        with pytest.raises(gr.Error) as refused:
            visitor.fire(visitor.find(column="Asked for"), "select", id=made_up)
        assert "There is no run" in str(refused.value.message) and "<img" not in str(refused.value.message)
    without_past_exports(home, family)
    visitor.shows[visitor.find(label="Trained run to export")._id]["value"] = "../../etc"
    with pytest.raises(gr.Error, match="There is no run"):
        visitor.fire(visitor.button("q4_k_m"), "click")
