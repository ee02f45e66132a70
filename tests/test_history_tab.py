import json
from pathlib import Path

import gradio as gr
import pytest
from visitor import Visitor

from bench.past import write_past
from katherine import runs
from katherine.runs import Run, State
from katherine.settings import Home
from ui import history
from ui.figure import Figure
from ui.panel import Panel

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def visit(home: Home) -> Visitor:
    visitor = Visitor(history, Panel.of(home))
    visitor.refresh()
    return visitor


def open_run(visitor: Visitor, run: Run) -> None:
    visitor.fire(visitor.find(style="k-all-runs"), "select", id=run.id)


def compare_with(visitor: Visitor, run: Run | None) -> None:
    visitor.choose(visitor.find(label="Compare with"), run.id if run else None, "input")


def listed(visitor: Visitor) -> list[str]:
    return visitor.value(visitor.find(style="k-all-runs"))["ids"]


def figures(visitor: Visitor) -> list[dict]:
    return [
        visitor.value(block)
        for block in visitor.page.blocks.values()
        if isinstance(block, Figure) and visitor.visible(block)
    ]


def details(visitor: Visitor, column: str) -> dict[str, list[str]]:
    """A table's rows by their first cell; `column` tells which table."""
    return {row[0]: row[1:] for row in visitor.rows(visitor.find(column=column))}


def test_an_empty_home_says_what_to_do(home):
    visitor = visit(home)
    table = visitor.value(visitor.find(style="k-all-runs"))
    assert table["rows"] == [] and "Start one" in table["empty"]


def test_all_runs_are_listed_newest_first_with_what_came_of_them(home):
    family = write_past(home, runs=8, steps=40, datasets=1)
    visitor = visit(home)
    assert listed(visitor) == [run.id for run in reversed(family)]
    rows = dict(zip(listed(visitor), visitor.rows(visitor.find(style="k-all-runs")), strict=True))
    last_sft = rows[family[4].id]
    assert last_sft[1:3] == ["sft", "succeeded"] and "loss" in last_sft[3] and last_sft[6] == "40"
    assert "of 3 files accepted" in rows[family[6].id][3]
    assert "of 78 probes passed" in rows[family[7].id][3]
    assert family[6].id.endswith(rows[family[7].id][5])


def test_nothing_is_sent_again_while_nothing_changes(home):
    family = write_past(home, runs=8, steps=40, datasets=1)
    visitor = visit(home)
    assert visitor.refresh() == set()
    open_run(visitor, family[0])
    assert visitor.refresh() == set()
    family[1].set_status(state=State.failed, reason="Disk full.")
    changed = visitor.refresh()
    assert visitor.find(style="k-all-runs") in changed
    assert not any(isinstance(block, Figure) for block in changed)


def test_runs_are_filtered_by_kind_state_and_text_of_themselves_or_their_parent(home):
    family = write_past(home, runs=20, steps=20, datasets=2)
    family[0].set_status(state=State.failed)
    visitor = visit(home)
    visitor.choose(visitor.find(label="Kind"), "sft")
    assert set(listed(visitor)) == {run.id for run in family if run.record.kind == "sft"}
    visitor.choose(visitor.find(label="State"), "failed")
    assert set(listed(visitor)) == {run.id for run in family if run.status().state is State.failed}
    visitor.choose(visitor.find(label="State"), "any")
    visitor.choose(visitor.find(label="Kind"), "any")
    visitor.choose(visitor.find(label="Search"), f"{family[5].record.dataset} {family[5].id.upper()}")
    assert listed(visitor) == [family[6].id, family[5].id]


def test_a_runs_page_has_its_recipe_with_what_differs_from_the_preset_first(home):
    sft, *_ = write_past(home, runs=4, steps=40, datasets=1)
    raw = json.loads((sft.path / "run.json").read_text())
    raw["recipe"]["learning_rate"] = 7e-5
    (sft.path / "run.json").write_text(json.dumps(raw))
    visitor = visit(home)
    open_run(visitor, sft)
    recipe = visitor.rows(visitor.find(style="k-frozen"))
    assert recipe[0][:3] == ["learning_rate", "0.00007", "0.0001"]
    assert {row[0] for row in recipe} == set(raw["recipe"])
    assert "1 differs from the preset k0" in visitor.html()
    facts = details(visitor, "Fact")
    assert facts["git revision"] == [sft.record.revision]
    assert facts["version of trl"] == [sft.record.versions["trl"]]
    assert facts["dataset, fingerprint"] == [sft.record.inputs["dataset"]]
    assert facts["steps"] == ["40"]


def test_a_runs_page_has_its_downloads_and_its_relatives_to_choose(home):
    sft, dpo, *_ = write_past(home, runs=4, steps=40, datasets=1)
    visitor = visit(home)
    open_run(visitor, sft)
    html = visitor.html()
    assert f'href="/operator/files/runs/{sft.id}/log.txt"' in html
    assert f'data-run="{dpo.id}"' in html
    drawing = next(b for b in visitor.page.blocks.values() if type(b).__name__ == "Drawing")
    visitor.fire(drawing, "select", id=dpo.id)
    assert visitor.value(visitor.find(style="k-all-runs"))["selected"] == dpo.id
    assert f"<h3>{dpo.id}</h3>" in visitor.html()


def test_curves_are_drawn_of_what_the_run_measured(home):
    sft, dpo, export, _ = write_past(home, runs=4, steps=40, datasets=1)
    visitor = visit(home)
    for run, count in ((sft, 3), (dpo, 6), (export, 0)):
        open_run(visitor, run)
        assert len(figures(visitor)) == count
        assert all(figure["layout"]["uirevision"] == run.id for figure in figures(visitor))


def test_any_two_are_compared_in_settings_results_and_both_curves(home):
    family = write_past(home, runs=8, steps=40, datasets=2)
    first, second = family[0], family[4]
    raw = json.loads((second.path / "run.json").read_text())
    raw["recipe"]["lora_r"] = 32
    (second.path / "run.json").write_text(json.dumps(raw))
    visitor = visit(home)
    open_run(visitor, first)
    compare_with(visitor, second)
    differences = details(visitor, "What differs")
    assert differences["sft.lora_r"] == ["64", "32"]
    assert differences["dataset"] == [first.record.dataset, second.record.dataset]
    assert "sft.max_length" not in differences
    results = details(visitor, "Difference#")
    assert results["steps"][:2] == [str(runs.result(first)["steps"]), str(runs.result(second)["steps"])]
    for figure in figures(visitor):
        assert {trace["uid"].split("_")[0] for trace in figure["data"]} == {first.id, second.id}
        assert {trace["name"] for trace in figure["data"]} == {run.id.split("-", 2)[2] for run in (first, second)}
    assert visitor.refresh() == set()
    compare_with(visitor, None)
    assert all(len(figure["data"]) == 1 for figure in figures(visitor))


def test_choosing_the_run_it_is_compared_with_ends_the_comparison(home):
    family = write_past(home, runs=8, steps=40, datasets=1)
    visitor = visit(home)
    open_run(visitor, family[0])
    compare_with(visitor, family[4])
    open_run(visitor, family[4])
    assert all(len(figure["data"]) == 1 for figure in figures(visitor))
    assert visitor.value(visitor.find(label="Compare with")) is None


def test_a_failed_run_says_why_and_what_to_do(home):
    sft, *_ = write_past(home, runs=4, steps=40, datasets=1)
    sft.set_status(state=State.failed, reason="Out of GPU memory.", remedy="Start again with half the batch.")
    visitor = visit(home)
    open_run(visitor, sft)
    assert "Out of GPU memory. Start again with half the batch." in visitor.html()


@pytest.mark.parametrize("damage", ["status.json", "result.json", "metrics.jsonl", "out/gguf/manifest.json"])
def test_damaged_files_are_named_and_nothing_else_suffers(home, damage):
    family = write_past(home, runs=4, steps=40, datasets=1)
    for run in family:
        if (run.path / damage).exists():
            (run.path / damage).write_bytes(b'\xff{"torn": ')
    visitor = visit(home)
    assert len(listed(visitor)) == 4
    for run in family:
        open_run(visitor, run)
        assert f"<h3>{run.id}</h3>" in visitor.html()


def test_a_run_that_is_removed_while_it_is_open_closes_its_page(home):
    family = write_past(home, runs=4, steps=40, datasets=1)
    visitor = visit(home)
    open_run(visitor, family[3])
    for path in sorted(family[3].path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    family[3].path.rmdir()
    visitor.refresh()
    assert family[3].id not in listed(visitor)
    with pytest.raises(gr.Error, match="There is no run"):
        open_run(visitor, family[3])


def test_names_from_data_are_escaped_wherever_they_are_html(home):
    (sft, *_) = write_past(home, runs=1, steps=10, datasets=1)
    raw = json.loads((sft.path / "run.json").read_text())
    raw |= {"dataset": HOSTILE, "who": HOSTILE, "revision": HOSTILE, "parent": HOSTILE}
    raw["recipe"]["base"] = HOSTILE
    raw["versions"] = {HOSTILE: HOSTILE}
    (sft.path / "run.json").write_text(json.dumps(raw))
    sft.set_status(state=State.failed, reason=HOSTILE, remedy=HOSTILE)
    visitor = visit(home)
    open_run(visitor, sft)
    assert "<img" not in visitor.html()
    assert visitor.html().count("&lt;img") >= 4


def test_a_made_up_run_is_refused_with_a_message_that_is_escaped(home):
    write_past(home, runs=1, steps=10, datasets=1)
    visitor = visit(home)
    with pytest.raises(gr.Error) as refused:
        visitor.fire(visitor.find(style="k-all-runs"), "select", id=HOSTILE)
    assert "<img" not in str(refused.value.message) and "&lt;img" in str(refused.value.message)
    with pytest.raises(gr.Error, match="There is no run"):
        visitor.fire(visitor.find(style="k-all-runs"), "select", id="../../etc")
