import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from counted import write_dataset

from bench.past import write_past
from katherine import lineage, runs
from katherine.errors import NotFound
from katherine.history import History
from katherine.runs import Run, State
from katherine.settings import Home
from ui import lineage as drawings

HOSTILE = '<img src=x onerror=alert(1)> ${alert(2)} {{value}} & "quoted"'


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def made(home: Home, kind: str, parent: Run | None = None, dataset: str | None = None) -> Run:
    return runs.create(home, kind, recipe={}, who="test", parent=parent.id if parent else None, dataset=dataset)


def trace(home: Home, run: Run) -> lineage.Lineage:
    return lineage.trace(home, History(home), run.id)


def kinds(found: lineage.Lineage) -> list[str]:
    return [node.kind for node in found.nodes]


def test_a_whole_line_goes_from_the_files_to_the_probes_whichever_run_is_asked(home):
    family = write_past(home, runs=4, steps=20, datasets=1)
    for run in family:
        found = trace(home, run)
        assert kinds(found) == ["files", "dataset", "sft", "dpo", "export", "probe"]
        assert found.of == run.id
        ids = [node.id for node in found.nodes]
        assert list(found.edges) == list(pairwise(ids))
        assert all(node.state == "succeeded" for node in found.nodes if node.is_run)


def test_nodes_say_what_matters_about_them(home):
    sft, *_ = write_past(home, runs=4, steps=20, datasets=1)
    facts = {node.kind: " ".join(node.facts) for node in trace(home, sft).nodes}
    assert "1,886 examples" in facts["dataset"] and "180 pairs" in facts["dataset"]
    assert "part_00.jsonl, 2,000 lines" in facts["files"]
    assert " → " in facts["sft"] and "margin" in facts["dpo"]
    assert "of 3 files accepted" in facts["export"] and "of 78 probes passed" in facts["probe"]


def test_all_descendants_are_shown_and_no_siblings(home):
    sft = made(home, "sft")
    first, second = made(home, "dpo", sft), made(home, "dpo", sft)
    export = made(home, "export", first)
    assert {node.id for node in trace(home, sft).nodes} == {sft.id, first.id, second.id, export.id}
    assert {node.id for node in trace(home, export).nodes} == {sft.id, first.id, export.id}
    assert {child.id for child in trace(home, sft).children(sft.id)} == {first.id, second.id}


def test_more_descendants_than_can_be_drawn_are_counted(home):
    sft = made(home, "sft")
    for _ in range(lineage.MOST + 3):
        made(home, "dpo", sft)
    found = trace(home, sft)
    assert len([node for node in found.nodes if node.kind == "dpo"]) == lineage.MOST
    assert found.nodes[-1].name == "and 3 more"


def test_a_parent_that_is_gone_and_a_dataset_that_is_gone_are_named_as_missing(home):
    sft = made(home, "sft", dataset="talk")
    dpo = made(home, "dpo", sft, dataset="talk")
    (sft.path / "run.json").unlink()
    found = trace(home, dpo)
    states = {node.id: node.state for node in found.nodes}
    assert states == {sft.id: "missing", "talk": "missing", dpo.id: "queued"}
    assert (sft.id, dpo.id) in found.edges and ("talk", dpo.id) in found.edges


def test_a_dataset_that_changed_or_was_damaged_since_is_named_so(home):
    write_dataset(home, "talk", fingerprint="abc")
    for asked, state in (("abc", ""), ("old", "changed")):
        run = runs.create(home, "sft", recipe={}, who="test", dataset="talk", inputs={"dataset": asked})
        assert [node.state for node in trace(home, run).nodes if node.kind == "dataset"] == [state]
    (home.datasets / "talk" / "report.json").write_text('{"fingerprint": 3')
    assert [node.state for node in trace(home, run).nodes if node.kind == "dataset"] == ["damaged"]


def test_a_second_dataset_on_the_way_stands_before_the_run_that_learned_from_it(home):
    write_dataset(home, "first")
    write_dataset(home, "second", files=7)
    sft = made(home, "sft", dataset="first")
    dpo = made(home, "dpo", sft, dataset="second")
    export = made(home, "export", dpo, dataset="second")
    found = trace(home, export)
    assert {parent.id for parent in found.parents(dpo.id)} == {sft.id, "second"}
    assert {parent.id for parent in found.parents(export.id)} == {dpo.id}
    (files,) = found.parents("second")
    assert files.name == "7 files" and files.facts[-1] == "and 3 more"


def test_runs_that_name_each_other_as_parents_do_not_hang_it(home):
    one, other = made(home, "sft"), made(home, "dpo")
    for run, parent in ((one, other), (other, one)):
        raw = json.loads((run.path / "run.json").read_text())
        (run.path / "run.json").write_text(json.dumps(raw | {"parent": parent.id}))
    assert {node.id for node in trace(home, one).nodes} == {one.id, other.id}


def test_asking_for_no_run_is_not_found(home):
    with pytest.raises(NotFound, match="There is no run"):
        lineage.trace(home, History(home), "absent")


def test_the_text_form_marks_the_run_and_indents_what_comes_of_it(home):
    _, dpo = write_past(home, runs=2, steps=20, datasets=1)
    lines = trace(home, dpo).lines()
    assert [line.startswith("→") for line in lines] == [False, False, False, True]
    assert dpo.id in lines[-1] and lines[-1].index("dpo") > lines[-2].index("sft")


def test_the_drawing_is_sound_xml_in_which_all_text_is_escaped(home):
    write_dataset(home, "talk", fingerprint="abc")
    report = json.loads((home.datasets / "talk" / "report.json").read_text())
    report["by_file"][0]["file"] = HOSTILE
    (home.datasets / "talk" / "report.json").write_text(json.dumps(report))
    run = made(home, "sft", dataset="talk")
    run.set_status(state=State.failed)
    drawn = str(drawings.draw(trace(home, run)))
    assert "<img" not in drawn and "&lt;img" in drawn
    across, down = ElementTree.fromstring(f"<both>{drawn}</both>")
    for picture in (across, down):
        titles = [title.text or "" for title in picture.iter("title")]
        assert any(HOSTILE in title for title in titles)
        assert picture.attrib["role"] == "img" and run.id in picture.attrib["aria-label"]
        assert HOSTILE in (picture.findtext("desc") or "")
    assert float(down.attrib["width"]) < 360 < float(across.attrib["width"])


def test_boxes_of_a_drawing_do_not_overlap(home):
    write_dataset(home, "talk", files=3)
    sft = made(home, "sft", dataset="talk")
    for _ in range(3):
        dpo = made(home, "dpo", sft, dataset="talk")
        for _ in range(2):
            made(home, "export", dpo, dataset="talk")
    drawn = str(drawings.draw(trace(home, sft)))
    for picture in ElementTree.fromstring(f"<both>{drawn}</both>"):
        boxes = [[float(box.attrib[k]) for k in ("x", "y", "width", "height")] for box in picture.iter("rect")]
        assert len(boxes) == 12
        for index, (x, y, w, h) in enumerate(boxes):
            for other_x, other_y, other_w, other_h in boxes[:index]:
                assert x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y


def test_runs_can_be_chosen_in_the_drawing_and_datasets_cannot(home):
    write_dataset(home, "talk", fingerprint="abc")
    sft = made(home, "sft", dataset="talk")
    export = made(home, "export", sft, dataset="talk")
    found = trace(home, export)

    def choosable(drawn: str) -> list[str]:
        across = ElementTree.fromstring(f"<both>{drawn}</both>")[0]
        return [each.attrib["data-run"] for each in across.iter() if "data-run" in each.attrib]

    assert choosable(str(drawings.draw(found))) == [sft.id, export.id]
    assert choosable(str(drawings.draw(found, ("export",)))) == [export.id]
