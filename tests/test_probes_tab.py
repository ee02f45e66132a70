import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import gradio as gr
import msgspec
import pytest
from exported import exported
from visitor import Visitor

from jobs import queue, slot
from katherine import columns, drafts, probes, probesets, runs, scorecard
from katherine.errors import DataError
from katherine.probes import Answer
from katherine.probesets import Probe
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.speakers import Reply
from ui import probes as tab
from ui.panel import Panel

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"
MINE = """\
name = "mine"
description = "Three questions."

[[probe]]
id = "who"
category = "identity"
ask = "Who are you?"
must = ['Katherine']
why = "The plainest."

[[probe]]
id = "warm"
category = "facts"
turns = ["Where do you live?", "Is it warm?"]
must_not = ['yes']

[[probe]]
id = "story"
category = "facts"
ask = "Tell me something."
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Its GPU slot is held by the test, so that what is queued is not carried out: asking is tested elsewhere."""
    home = Home(tmp_path / "home")
    home.root.mkdir()
    with slot.take(home, "test"):
        yield home
        for run, _ in queue.unfinished(home):
            queue.stop(home, run.id, kill=True)


@pytest.fixture
def export(home) -> Run:
    return dated(exported(home))


def dated(run: Run) -> Run:
    """With a dataset, as an export of a pipeline has one."""
    folder = run.path.parent.parent / "datasets" / "talk"
    folder.mkdir(parents=True, exist_ok=True)
    record = msgspec.json.decode((run.path / "run.json").read_bytes())
    runs.write_json(run.path / "run.json", record | {"dataset": "talk"})
    return runs.load(Home(run.path.parent.parent), run.id)


def asked(
    home: Home, export: Run, said: Mapping[str, Mapping[str, str]], text: str | None = MINE, recipe: dict | None = None
) -> Run:
    """A finished probe run: column → probe → what it answered. Without a text, as of before a run kept its set."""
    files = {probes.FROZEN: text} if text else {}
    given = {"probes": "mine"} | (recipe or {})
    run = runs.create(home, "probe", recipe=given, who="test", parent=export.id, dataset="talk", files=files)
    chosen = {probe.id: probe for probe in probesets.read(text or MINE, "mine").probe}
    with probes.Record(run.out, chosen.values(), {}) as record:
        for model, answers in said.items():
            for probe, answer in answers.items():
                record.add(model, [chosen[probe]], {probe: (talk(chosen[probe], answer), Reply(answer, True, 3))})
    runs.write_json(run.path / "result.json", {"models": record.summary, "answers": {}})
    run.set_status(state=State.succeeded, attempt=1, started=runs.now(), ended=runs.now())
    return run


def talk(probe: Probe, answer: str) -> list[probes.Message]:
    found = []
    for question in probe.questions:
        found += [probes.Message("user", question), probes.Message("assistant", "Hm.")]
    return [*found[:-1], probes.Message("assistant", answer)]


GOOD = {"who": "Katherine.", "warm": "No.", "story": "A tale."}
BAD = {"who": "ChatGPT.", "warm": "yes", "story": "A tale."}


def visit(home: Home) -> Visitor:
    visitor = Visitor(tab, Panel.of(home))
    visitor.refresh()
    return visitor


def queued(home: Home) -> list[Run]:
    return [run for run in runs.everyone(home) if run.record.kind == "probe" and not run.status().attempt]


def matrix(visitor: Visitor) -> gr.HTML:
    return visitor.find(style="k-matrix")


# ---------------------------------------------------------------------------------------------------- asking


def test_without_an_export_the_page_says_what_to_do_and_cannot_ask(home):
    visitor = visit(home)
    assert "There is no finished export yet" in visitor.html()
    assert "Nothing has been asked yet" in visitor.value(visitor.find(column="Asked for"))["empty"]
    with pytest.raises(gr.Error, match="no export to ask"):
        visitor.fire(visitor.button("Ask all"), "click")
    assert len(visitor.rows(visitor.find(column="Rules"))) == len(probesets.load(home, "katherine").probe)


def test_one_click_asks_the_newest_exports_own_files_with_the_recipes_settings(home, export):
    drafts.set_recipe(home, "probe", drafts.load(home).values["probe"] | {"max_new_tokens": 77, "stages": True})
    visitor = visit(home)
    assert visitor.value(visitor.find(label="Columns to ask")) == [each.id for each in columns.of_export(home, export)]
    visitor.fire(visitor.button("Ask all"), "click")
    (run,) = queued(home)
    assert run.record.parent == export.id
    assert run.record.recipe | {"temperature": 0, "seed": 0} == {
        "probes": "katherine", "max_new_tokens": 77, "temperature": 0, "seed": 0, "stages": False, "own": True,
        "quants": [], "columns": [],
    }  # fmt: skip
    assert (run.out / "probes.toml").read_text() == probesets.text(home, "katherine")
    visitor.fire(visitor.button("Ask all"), "click")
    assert queued(home) == [run]


def test_chosen_columns_and_another_export_and_set_are_asked(home, export):
    newer = dated(exported(home, quants=("q6_k",)))
    probesets.save(home, "mine", MINE)
    visitor = visit(home)
    assert visitor.value(visitor.find(label="Export")) == newer.id
    visitor.choose(visitor.find(label="Export"), export.id, "input")
    assert visitor.value(visitor.find(label="Columns to ask")) == [each.id for each in columns.of_export(home, export)]
    visitor.choose(visitor.find(label="Columns to ask"), [f"{export.id}:q5_k_m", f"{newer.id}:q6_k"], "input")
    visitor.choose(visitor.find(label="Probe set"), "mine", "input")
    assert "3 probes to each of 2 columns." in visitor.html()
    visitor.refresh()
    assert visitor.value(visitor.find(label="Columns to ask")) == [f"{export.id}:q5_k_m", f"{newer.id}:q6_k"]
    visitor.fire(visitor.button("Ask all"), "click")
    (run,) = queued(home)
    assert (run.record.parent, run.record.recipe["probes"]) == (export.id, "mine")
    assert (run.record.recipe["quants"], run.record.recipe["columns"]) == (["q5_k_m"], [f"{newer.id}:q6_k"])


def test_nothing_chosen_or_made_up_is_refused(home, export):
    visitor = visit(home)
    visitor.choose(visitor.find(label="Columns to ask"), [], "input")
    with pytest.raises(gr.Error, match="No column is chosen"):
        visitor.fire(visitor.button("Ask all"), "click")
    for made_up in ("../../etc/passwd:q4_k_m", f"{export.id}:q8_0", HOSTILE):
        visitor.shows[visitor.find(label="Columns to ask")._id]["value"] = [made_up]
        with pytest.raises(gr.Error) as refused:
            visitor.fire(visitor.button("Ask all"), "click")
        assert "<img" not in str(refused.value.message)
    visitor.shows[visitor.find(label="Columns to ask")._id]["value"] = [f"{export.id}:q4_k_m"]
    visitor.shows[visitor.find(label="Probe set")._id]["value"] = "/etc/hosts.toml"
    for button in ("Ask all", "Edit"):
        with pytest.raises(gr.Error, match="There is no probe set"):
            visitor.fire(visitor.button(button), "click")
    assert queued(home) == []


def test_a_run_under_way_shows_where_it_is_and_can_be_stopped_twice(home, export):
    visitor = visit(home)
    visitor.fire(visitor.button("Ask all"), "click")
    (run,) = queued(home)
    ours = {"supervisor": 1, "machine": "another", "heartbeat": runs.now(), "started": runs.now(), "attempt": 1}
    run.set_status(state=State.running, phase="ask q4_k_m (1 of 3)", step=4, of=30, pid=1, **ours)
    visitor.refresh()
    assert "ask q4_k_m (1 of 3), 4 of 30" in visitor.html()
    visitor.fire(visitor.button("Stop"), "click")
    assert queue.control(run).read_text() == "keep"
    run.set_status(state=State.stopping)
    visitor.refresh()
    visitor.fire(visitor.button("End it now"), "click")
    assert queue.control(run).read_text() == "kill"
    run.set_status(state=State.cancelled, reason="Stopped by you and killed.")
    visitor.refresh()
    assert "Stopped by you and killed." in visitor.html() and "<progress" not in visitor.html()


# ---------------------------------------------------------------------------------------------------- results


def test_results_are_a_table_of_probes_and_columns_with_the_failed_first(home, export):
    asked(home, export, {"q4_k_m": GOOD, "q6_k": GOOD | {"warm": "yes"}})
    visitor = visit(home)
    assert visitor.rows(matrix(visitor)) == [
        ["warm", "facts", "Is it warm?", "passed", "failed"],
        ["story", "facts", "Tell me something.", "for the reviewer", "for the reviewer"],
        ["who", "identity", "Who are you?", "passed", "passed"],
    ]
    assert visitor.rows(visitor.find(style="k-lines", column="q4_k_m")) == [
        ["all", "2 of 2, 34 to 100%", "1 of 2, 9 to 91%"],
        ["identity", "1 of 1, 21 to 100%", "1 of 1, 21 to 100%"],
        ["facts", "1 of 1, 21 to 100%", "0 of 1, 0 to 79%"],
        ["for the reviewer", "1", "1"],
    ]
    assert visitor.rows(visitor.find(column="Only the first passed")) == [
        ["q4_k_m and q6_k", "2", "1: warm", "none", "may be chance (p 1)"]
    ]
    assert "of 3 probes as it was then" in visitor.html()


def test_a_click_shows_every_answer_with_the_whole_talk_and_what_decided(home, export):
    asked(home, export, {"q4_k_m": GOOD, "q6_k": BAD})
    visitor = visit(home)
    assert "k-card" not in visitor.html()
    visitor.fire(matrix(visitor), "select", id="warm")
    html = visitor.html()
    assert html.count("<article") == 2 and html.count("Where do you live?") == 2
    assert "says &#39;yes&#39;, against &#39;yes&#39;" in html and "nothing matches yes" in html
    assert "Asked of each answer: says something; ends by itself; shows no &lt;think&gt;; must not match yes." in html
    visitor.fire(matrix(visitor), "select", id="story")
    assert "it is for the reviewer" in visitor.html()
    visitor.fire(matrix(visitor), "select", id=HOSTILE)
    assert visitor.value(visitor.find(style="k-probe-answers")) == ""


def test_a_run_is_compared_with_an_earlier_one_on_what_both_were_asked(home, export):
    before = asked(home, export, {"q4_k_m": BAD, "q6_k": GOOD}, recipe={"max_new_tokens": 40})
    another = MINE.replace("Is it warm?", "Is it cold?").replace("must = ['Katherine']", "must = ['K']")
    asked(home, export, {"q4_k_m": GOOD, "q6_k": GOOD}, another, {"max_new_tokens": 96})
    visitor = visit(home)
    visitor.choose(visitor.find(label="Compare with"), before.id, "input")
    # The reviewer's probe and the one that is another question by now do not count.
    assert visitor.rows(visitor.find(column="Failed since")) == [
        ["q4_k_m", "1", "0", "1", "none", "1: who", "may be chance (p 1); the rules of who are others now"],
        ["q6_k", "1", "1", "1", "none", "none", "no difference; the rules of who are others now"],
    ]
    assert "Then asked otherwise: longest answer 40, here 96." in visitor.html()
    visitor.choose(visitor.find(label="Compare with"), HOSTILE, "input")
    assert visitor.rows(visitor.find(column="Failed since")) == []


def test_a_run_of_before_sets_were_kept_is_shown_with_what_is_known(home, export):
    asked(home, export, {"base": {"who": "ChatGPT."}, "q4_k_m": GOOD, "q6_k": BAD}, text=None)
    visitor = visit(home)
    assert "the rules are not" in visitor.html()
    assert [row[0] for row in visitor.rows(matrix(visitor))] == ["who", "warm", "story"]
    # The base is asked to show what training did, not to compare quants.
    assert [row[0] for row in visitor.rows(visitor.find(column="Only the first passed"))] == ["q4_k_m and q6_k"]


def test_a_run_is_chosen_from_the_list(home, export):
    older = asked(home, export, {"q4_k_m": GOOD})
    asked(home, export, {"q6_k": GOOD})
    visitor = visit(home)
    assert visitor.value(matrix(visitor))["columns"][-1] == "q6_k"
    visitor.fire(visitor.find(column="Asked for"), "select", id=older.id)
    assert visitor.value(matrix(visitor))["columns"][-1] == "q4_k_m"
    with pytest.raises(gr.Error, match="There is no run"):
        visitor.fire(visitor.find(column="Asked for"), "select", id="../../etc")


def test_answers_appear_while_the_run_goes_on_and_nothing_is_sent_twice(home, export):
    run = asked(home, export, {"q4_k_m": {"who": "Katherine."}})
    run.set_status(state=State.running)
    visitor = visit(home)
    assert len(visitor.rows(matrix(visitor))) == 1
    assert visitor.refresh() == set()
    line = msgspec.json.encode(
        msgspec.structs.replace(probes.answers(run.out)[0], probe="warm", category="facts")
    )  # fmt: skip
    with (run.out / "answers.jsonl").open("ab") as out:
        out.write(line + b'\n{"torn')
    visitor.refresh()
    assert len(visitor.rows(matrix(visitor))) == 2


@pytest.mark.parametrize("content", ["[\n", "{}\n", "null\n", '{"model":1}\n'])
def test_a_damaged_file_of_answers_is_named_and_the_page_stays(home, export, content):
    run = asked(home, export, {"q4_k_m": GOOD})
    (run.out / "answers.jsonl").write_text(content)
    visitor = visit(home)
    assert "answers.jsonl is damaged" in visitor.html() and visitor.rows(matrix(visitor)) == []


def test_what_a_model_says_is_text_wherever_it_stands(home, export):
    hostile = MINE.replace("Who are you?", f"Who {HOSTILE}").replace("Three questions.", HOSTILE)
    hostile = hostile.replace("The plainest.", HOSTILE)
    probesets.save(home, "mine", hostile)
    asked(home, export, {"q4_k_m": {"who": HOSTILE}, f"{export.id}:{HOSTILE}": GOOD}, hostile)
    visitor = visit(home)
    visitor.choose(visitor.find(label="Probe set"), "mine", "input")
    visitor.fire(matrix(visitor), "select", id="who")
    assert "<img" not in visitor.html() and visitor.html().count("&lt;img") >= 4


def test_the_results_are_a_spreadsheet_in_which_no_answer_is_a_formula(home, export):
    formula = '=HYPERLINK("http://x","Katherine")'
    run = asked(home, export, {"q4_k_m": GOOD | {"who": formula}, "q6_k": {"who": "+Katherine"}})
    rows = list(csv.DictReader(io.StringIO("".join(scorecard.as_csv(scorecard.read(run))))))
    assert [(row["probe"], row["model"], row["result"]) for row in rows] == [
        ("who", "q4_k_m", "passed"), ("who", "q6_k", "passed"), ("warm", "q4_k_m", "passed"),
        ("story", "q4_k_m", "for the reviewer"),
    ]  # fmt: skip
    assert rows[0]["answer"] == f"'{formula}" and rows[1]["answer"] == "'+Katherine"
    link = re.search(r'href="([^"]*results\.csv)"', visit(home).html())
    assert link and link.group(1) == f"/operator/files/runs/{run.id}/results.csv"


# ---------------------------------------------------------------------------------------------------- sets


def edit(visitor: Visitor, text: str, name: str | None = None) -> None:
    visitor.fire(visitor.button("Edit"), "click")
    visitor.shows[visitor.find(gr.Code)._id]["value"] = text
    if name is not None:
        visitor.shows[visitor.find(label="Save under the name")._id]["value"] = name
    visitor.fire(visitor.button("Save"), "click")


def test_the_built_in_set_is_saved_under_another_name_and_is_chosen_then(home):
    visitor = visit(home)
    assert "Built in" in visitor.html()
    edit(visitor, MINE, "")
    assert "Give it a name" in visitor.html()
    edit(visitor, MINE, "katherine")
    assert "stays as it is" in visitor.html()
    edit(visitor, MINE.replace('name = "mine"', 'name = "x"'), "mine")
    assert "Saved as mine." in visitor.html() and probesets.text(home, "mine") == MINE
    assert visitor.value(visitor.find(label="Probe set")) == "mine"
    assert [row[0] for row in visitor.rows(visitor.find(column="Rules"))] == ["who", "warm", "story"]
    assert visitor.rows(visitor.find(column="Rules"))[2][3] == "no rule: for the reviewer"


def test_what_does_not_parse_is_named_by_probe_and_line_and_the_text_stays(home):
    probesets.save(home, "mine", MINE)
    visitor = visit(home)
    visitor.choose(visitor.find(label="Probe set"), "mine", "input")
    broken = MINE.replace("'Katherine'", "'('") + HOSTILE
    edit(visitor, broken)
    assert "not TOML" in visitor.html() and "line 21" in visitor.html()
    edit(visitor, MINE.replace("'Katherine'", "'(<img>'"))
    assert "line 8, probe &#39;who&#39;, must" in visitor.html() and "<img>" not in visitor.html()
    assert visitor.value(visitor.find(gr.Code)) == MINE.replace("'Katherine'", "'(<img>'")
    assert probesets.text(home, "mine") == MINE
    visitor.fire(visitor.button("Check only"), "click")
    assert "line 8" in visitor.html()
    visitor.refresh()
    assert visitor.value(visitor.find(gr.Code)) == MINE.replace("'Katherine'", "'(<img>'")


def test_two_who_edit_a_set_do_not_write_over_each_other(home):
    probesets.save(home, "mine", MINE)
    visitor = visit(home)
    visitor.choose(visitor.find(label="Probe set"), "mine", "input")
    visitor.fire(visitor.button("Edit"), "click")
    theirs = MINE.replace("Three", "Their three")
    probesets.save(home, "mine", theirs)
    visitor.fire(visitor.button("Save"), "click")
    assert "somebody saved it meanwhile" in visitor.html() and probesets.text(home, "mine") == theirs
    visitor.shows[visitor.find(label="Save under the name")._id]["value"] = "ours"
    visitor.fire(visitor.button("Save"), "click")
    assert probesets.names(home) == ["katherine", "mine", "ours"]
    # Saved once, it can be saved again.
    visitor.fire(visitor.button("Save"), "click")
    assert "Saved as ours." in visitor.html()


def test_a_set_is_deleted_on_a_second_word_and_the_built_in_one_never(home):
    probesets.save(home, "mine", MINE)
    visitor = visit(home)
    assert not visitor.visible(visitor.find(gr.Group, style="k-again"))
    with pytest.raises(AssertionError):
        visitor.button("Delete …")
    visitor.choose(visitor.find(label="Probe set"), "mine", "input")
    visitor.fire(visitor.button("Delete …"), "click")
    visitor.fire(visitor.button("Leave it"), "click")
    assert probesets.names(home) == ["katherine", "mine"]
    visitor.fire(visitor.button("Delete …"), "click")
    visitor.fire(visitor.button("Delete it"), "click")
    assert probesets.names(home) == ["katherine"] and visitor.value(visitor.find(label="Probe set")) == "katherine"
    visitor.shows[visitor.find(label="Probe set")._id]["value"] = "katherine"
    function = next(fn for fn in visitor.page.fns.values() if fn.fn.__name__ == "delete_it")
    with pytest.raises(gr.Error, match="cannot be deleted"):
        visitor.fire(visitor.page.blocks[function.targets[0][0]], "click")


def test_a_set_that_cannot_be_read_is_named_and_cannot_be_asked(home, export):
    probesets.folder(home).mkdir()
    (probesets.folder(home) / "broken.toml").write_text(f"name = {HOSTILE}")
    visitor = visit(home)
    visitor.choose(visitor.find(label="Probe set"), "broken", "input")
    assert "this is not TOML" in visitor.html() and "<img" not in visitor.html()
    with pytest.raises(gr.Error, match="not TOML"):
        visitor.fire(visitor.button("Ask all"), "click")
    edit(visitor, MINE)
    assert "Saved as broken." in visitor.html() and probesets.load(home, "broken").name == "broken"


def test_an_answer_without_a_question_is_damage_and_no_bug(home, export):
    run = asked(home, export, {"q4_k_m": GOOD})
    alone = Answer("q4_k_m", "who", "identity", (probes.Message("assistant", "x"),), probes.Score(True, ()))
    (run.out / "answers.jsonl").write_bytes(msgspec.json.encode(alone) + b"\n")
    with pytest.raises(DataError, match="without a question"):
        scorecard.read(run)
