import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import msgspec
import pytest
from browser import Served
from exported import entry, exported
from persona import baked_gguf, persona
from visitor import Visitor

from jobs import errands, pool, queue, slot
from katherine import columns, runs, talks
from katherine.runs import ENDED, Run
from katherine.settings import PROJECT, Home
from katherine.talks import Answer, Round, Sampling, Talk
from ui import chat
from ui.panel import Panel

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"
WHO_ARE_YOU = ("Who are you?", "Katherine. I count chairs. 🪑")
# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 60.0


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path, katherine_home) -> Home:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    # The small base's tokenizer and the converter are the session's; the bases that are made here are not.
    home.cache.mkdir()
    for path in katherine_home.cache.iterdir():
        if path.name != "base-gguf":
            (home.cache / path.name).symlink_to(path)
    return home


def make_export(home: Home, root: Path, *quants: str) -> Run:
    """An export whose files are the persona's GGUF, each under the name of another quant."""
    found, file = persona(root), baked_gguf(root)
    run = exported(home, quants)
    folder = run.out / "gguf"
    manifest = json.loads((folder / "manifest.json").read_text())
    for each in manifest["files"]:
        (folder / each["file"]).unlink()
        os.link(file, folder / each["file"])
        each |= entry(folder / each["file"], each["quant"])
    adapter = runs.load(home, run.record.parent or "").out / "adapter"
    (adapter / "base.json").write_text((found.adapter / "base.json").read_text())
    baked = hashlib.sha256(found.template.baked.encode()).hexdigest()
    manifest |= {"base": str(found.base), "template_sha256": baked}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def export(home, tmp_path_factory) -> Run:
    return make_export(home, tmp_path_factory.getbasetemp(), "q4_k_m", "q6_k")


@pytest.fixture
def panel(home) -> Iterator[Panel]:
    panel = Panel.of(home)
    yield panel
    panel.asking.close()
    panel.pool.close()
    panel.renderer.close()


class Reader(Visitor):
    """The chat tab as one person has it open."""

    def __init__(self, panel: Panel):
        super().__init__(chat, panel)
        self.question = self.find(gr.Textbox, label="Question")
        self.models = self.find(label="Models to talk to, side by side")
        self.past, self.now = self.find(style="k-past"), self.find(style="k-now")
        self.timer = self.find(gr.Timer)
        (self.status,) = (b for b in self.page.blocks.values() if "role='status'" in getattr(b, "html_template", ""))
        (self.open,) = (b for b in self.page.blocks.values() if "kept(" in (getattr(b, "js_on_load", "") or ""))
        self.list = self.find(column="First question")
        self.refresh()

    def greedy(self) -> "Reader":
        self.shows[self.find(label="Temperature")._id]["value"] = 0
        return self

    def ask(self, question: str) -> None:
        self.shows[self.question._id]["value"] = question
        self.fire(self.question, "submit")

    def polls(self) -> bool:
        return bool(self.shows[self.timer._id].get("active"))

    def wait(self) -> None:
        """As the page does: polls until it is told to rest."""
        deadline = time.monotonic() + PATIENCE
        while self.polls():
            assert time.monotonic() < deadline, self.answers()
            self.fire(self.timer, "tick")
            time.sleep(0.02)

    def talk(self) -> list[dict[str, Any]]:
        return [each for part in (self.past, self.now) for each in (self.value(part) or {"rounds": []})["rounds"]]

    def answers(self, number: int = -1) -> dict[str, dict[str, Any]]:
        return {each["title"]: each for each in self.talk()[number]["answers"]}

    def said(self, number: int = -1) -> dict[str, str]:
        return {title: each["text"] for title, each in self.answers(number).items()}


def kept_talk(home: Home, *said: tuple[str, str], **given: Any) -> Talk:
    """A talk as it lies on the disk, with one column that is gone."""
    values: dict[str, Any] = {"who": "operator", "role": "operator", "sampling": Sampling()} | given
    talk = talks.create(home, files={"gone:q4_k_m": "ab" * 32}, **values)
    rounds = tuple(
        Round(asked, talk.sampling, (Answer("gone:q4_k_m", "done", text, finish="end"),)) for asked, text in said
    )
    talk = msgspec.structs.replace(talk, rounds=rounds)
    talks.save(home, talk)
    return talk


def test_without_an_export_the_page_says_what_to_do_and_takes_no_question(panel):
    reader = Reader(panel)
    assert "export a trained run in the Export tab" in reader.html()
    assert not reader.visible(reader.question) and not reader.visible(reader.models)


def test_the_newest_exports_quants_are_chosen_and_others_offered(home, panel, tmp_path_factory):
    older = exported(home, ("q4_k_m",))
    newer = exported(home, ("q4_k_m", "q6_k", "bf16"))
    reader = Reader(panel)
    assert reader.value(reader.models) == [f"{newer.id}:q4_k_m", f"{newer.id}:q6_k"]
    offered = {value for _, value in reader.shows[reader.models._id]["choices"]}
    assert offered == {f"{newer.id}:{quant}" for quant in ("q4_k_m", "q6_k", "bf16")} | {f"{older.id}:q4_k_m"}
    labels = [label for label, _ in reader.shows[reader.models._id]["choices"]]
    assert len(set(labels)) == 4 and f"q4_k_m · export-{older.id[-6:]}" in labels


def test_all_answer_side_by_side_each_with_its_own_memory_and_what_was_measured(export, panel):
    reader = Reader(panel).greedy()
    reader.ask("Where do you live?")
    assert reader.polls() and reader.value(reader.question) == ""
    assert reader.value(reader.status) == "They are answering …"
    assert reader.shows[reader.button("Send")._id]["interactive"] is False
    reader.wait()
    assert reader.said() == {"q4_k_m": "Austin, behind teal walls.", "q6_k": "Austin, behind teal walls."}
    assert reader.value(reader.status) == "All 2 answered."
    assert reader.shows[reader.button("Send")._id]["interactive"] is True
    answer = reader.answers()["q6_k"]
    assert answer["words"] == "ended by itself" and not answer["busy"] and not answer["back"]
    assert "tokens/s" in answer["facts"] and "first token after" in answer["facts"]
    reader.ask("Is it warm?")
    reader.wait()
    assert reader.said() == {"q4_k_m": "Not at my feet.", "q6_k": "Not at my feet."}
    assert [each["question"] for each in reader.talk()] == ["Where do you live?", "Is it warm?"]
    (kept,) = talks.everyone(panel.home)
    assert kept.files == {
        f"{export.id}:{quant}": columns.get(panel.home, f"{export.id}:{quant}").sha256 for quant in ("q4_k_m", "q6_k")
    }


def test_only_what_changed_is_sent(export, panel):
    reader = Reader(panel).greedy()
    reader.ask("Who are you?")
    reader.wait()
    reader.ask("Sing!")
    sent = set()
    deadline = time.monotonic() + PATIENCE
    while reader.polls():
        assert time.monotonic() < deadline
        sent |= reader.fire(reader.timer, "tick")
    assert reader.now in sent and reader.past not in sent
    # An engine is put back a moment after its answer has ended.
    until(lambda: all(each.state == "ready" for each in panel.pool.view().loaded))
    reader.fire(reader.timer, "tick")
    assert reader.fire(reader.timer, "tick") == set()
    reader.refresh()
    assert reader.refresh() == set()


def test_an_answer_cut_at_the_limit_says_so(export, panel):
    reader = Reader(panel).greedy()
    reader.shows[reader.find(label="Tokens at most")._id]["value"] = 3
    reader.ask("Who are you?")
    reader.wait()
    assert {each["words"] for each in reader.answers().values()} == {"cut at the limit"}


def test_editing_an_earlier_question_drops_what_followed_and_says_so_before(export, panel):
    reader = Reader(panel).greedy()
    for question in ("Where do you live?", "Is it warm?"):
        reader.ask(question)
        reader.wait()
    reader.fire(reader.past, "edit", round=0)
    assert reader.value(reader.question) == "Where do you live?"
    assert (
        "Editing question 1 of 2. When you send, it is answered anew. The question after it is dropped."
        in reader.html()
    )
    reader.fire(reader.button("Do not edit"), "click")
    assert len(reader.talk()) == 2 and reader.value(reader.question) == ""
    reader.fire(reader.past, "edit", round=0)
    reader.ask("Who are you?")
    reader.wait()
    assert [each["question"] for each in reader.talk()] == ["Who are you?"]
    assert set(reader.said().values()) == {WHO_ARE_YOU[1]}
    assert "Editing question" not in reader.html()


def test_the_same_is_asked_again_with_the_next_seed(export, panel):
    reader = Reader(panel)
    reader.ask("Who are you?")
    reader.wait()
    reader.fire(reader.button("Again, seed 1"), "click")
    reader.wait()
    (only,) = reader.talk()
    assert only["question"] == "Who are you?" and only["aside"] == "seed 1"
    assert talks.everyone(panel.home)[0].rounds[0].sampling.seed == 1
    assert reader.button("Again, seed 2")


def test_a_greedy_talk_offers_no_other_seed(export, panel):
    reader = Reader(panel).greedy()
    reader.ask("Who are you?")
    reader.wait()
    with pytest.raises(AssertionError):
        reader.button("Again")


def test_stop_keeps_what_was_said_and_each_can_be_asked_again(export, panel):
    reader = Reader(panel)
    reader.shows[reader.find(label="Temperature")._id]["value"] = 2
    reader.shows[reader.find(label="Top p")._id]["value"] = 1
    reader.shows[reader.find(label="Top k")._id]["value"] = 0
    reader.shows[reader.find(label="Tokens at most")._id]["value"] = 4000
    reader.ask("Sing!")
    until(lambda: reader.fire(reader.timer, "tick") is not None and all(reader.said().values()))
    reader.fire(reader.button("Stop"), "click")
    reader.wait()
    ended = reader.answers()["q4_k_m"]
    assert ended["words"] == "stopped" and ended["text"] and ended["back"] == "Ask it again"
    reader.fire(reader.now, "retry", column=ended["column"])
    until(lambda: reader.fire(reader.timer, "tick") is not None and reader.answers()["q4_k_m"]["busy"])
    assert reader.answers()["q6_k"]["words"] == "stopped"
    reader.fire(reader.button("Stop"), "click")
    reader.wait()


def test_an_engine_that_dies_shows_in_its_column_and_one_click_brings_it_back(export, panel):
    reader = Reader(panel).greedy()
    reader.shows[reader.find(label="Tokens at most")._id]["value"] = 400
    reader.ask("Sing!")
    column = f"{export.id}:q4_k_m"
    until(lambda: reader.fire(reader.timer, "tick") is not None and reader.said()["q4_k_m"])
    pids = {each.column: each.pid for each in panel.pool.view().loaded}
    os.kill(pids[column], signal.SIGKILL)
    reader.wait()
    dead = reader.answers()["q4_k_m"]
    assert dead["words"] == "failed" and dead["bad"] and dead["note"] and dead["back"] == "Bring it back"
    assert reader.answers()["q6_k"]["words"] in ("cut at the limit", "ended by itself")
    assert reader.value(reader.status) == "q6_k answered; q4_k_m failed."
    reader.fire(reader.now, "retry", column=column)
    reader.wait()
    assert reader.value(reader.status) == "All 2 answered."


def test_a_file_that_was_changed_fails_in_its_column_alone(export, panel):
    changed = columns.get(panel.home, f"{export.id}:q4_k_m").path
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.unlink()  # it is a link to the session's file
    changed.write_bytes(content)
    reader = Reader(panel).greedy()
    reader.ask("Who are you?")
    reader.wait()
    assert reader.answers()["q4_k_m"]["words"] == "failed" and "sha256" in reader.answers()["q4_k_m"]["note"]
    assert reader.said()["q6_k"] == WHO_ARE_YOU[1]


def test_two_tabs_of_the_browser_see_the_same_talk_grow(export, panel):
    first, second = Reader(panel).greedy(), Reader(panel)
    first.ask("Who are you?")
    second.shows[second.open._id]["value"] = first.value(first.open)
    second.refresh()  # as after a reload, which keeps the id of the open talk alone
    assert second.polls()
    first.wait()
    second.wait()
    assert second.said() == first.said() and set(second.said().values()) == {WHO_ARE_YOU[1]}


def test_questions_that_cannot_be_asked_are_refused_in_words_and_leave_no_talk(export, panel):
    reader = Reader(panel)
    for wrong, why in (("  \n", "no question yet"), ("x" * 10**6, "characters")):
        with pytest.raises(gr.Error, match=why):
            reader.ask(wrong)
    reader.shows[reader.models._id]["value"] = []
    with pytest.raises(gr.Error, match="choose one model"):
        reader.ask("Who are you?")
    reader.shows[reader.models._id]["value"] = ["../../etc:passwd"]
    with pytest.raises(gr.Error):
        reader.ask("Who are you?")
    reader.shows[reader.models._id]["value"] = [f"{export.id}:q4_k_m"]
    reader.shows[reader.find(label="Seed")._id]["value"] = None
    with pytest.raises(gr.Error, match="seed: None is no whole number"):
        reader.ask("Who are you?")
    assert talks.everyone(panel.home) == []


def test_an_earlier_talk_is_opened_from_the_list_and_gone_on_with(home, export, panel):
    kept = kept_talk(home, ("Who were you?", "Somebody."), ("And now?", "Nobody."))
    reader = Reader(panel)
    assert [row[1:3] for row in reader.rows(reader.list)] == [["Who were you?", "2"]]
    reader.fire(reader.list, "select", id=kept.id)
    assert [each["question"] for each in reader.talk()] == ["Who were you?", "And now?"]
    assert reader.visible(reader.question) and not reader.visible(reader.models)
    assert f"/operator/files/talks/{kept.id}.json" in reader.html()
    reader.ask("Still there?")
    reader.wait()
    (gone,) = reader.answers().values()
    assert gone["words"] == "failed" and gone["note"]


def test_a_reviewers_talk_is_not_this_tabs(home, export, panel):
    theirs = kept_talk(home, ("Blind?", "Yes."), role="reviewer")
    reviewed = kept_talk(home, ("Blind?", "Yes."), export=export.id)
    reader = Reader(panel)
    assert reader.rows(reader.list) == []
    for talk_id in (theirs.id, reviewed.id, "../../etc/passwd", HOSTILE):
        with pytest.raises(gr.Error) as refused:
            reader.fire(reader.list, "select", id=talk_id)
        assert "<img" not in str(refused.value.message)


def test_a_talk_that_is_gone_gives_way_to_a_new_one(home, export, panel):
    reader = Reader(panel).greedy()
    reader.shows[reader.open._id]["value"] = "20200101-000000-abc"
    reader.refresh()
    assert "The talk that was open here is gone" in reader.html()
    reader.ask("Who are you?")
    reader.wait()
    assert set(reader.said().values()) == {WHO_ARE_YOU[1]}
    assert "is gone" not in reader.html()


def test_a_new_talk_begins_with_the_settings_of_the_one_before(home, export, panel):
    files = {f"{export.id}:q6_k": "ab" * 32, "gone:q4_k_m": "cd" * 32}
    sampling = Sampling(seed=5, temperature=0.3, top_k=7)
    talk = talks.create(home, who="operator", role="operator", files=files, sampling=sampling, system="Be rude.")
    talks.save(home, msgspec.structs.replace(talk, rounds=(Round("?", sampling, (Answer("gone:q4_k_m", "done"),)),)))
    reader = Reader(panel)
    reader.fire(reader.list, "select", id=talk.id)
    reader.fire(reader.button("New talk"), "click")
    assert reader.visible(reader.models) and reader.talk() == []
    assert reader.value(reader.models) == [f"{export.id}:q6_k"]
    assert reader.value(reader.find(label="System prompt")) == "Be rude."
    assert [reader.value(reader.find(label=label)) for label in ("Seed", "Temperature", "Top k")] == [5, 0.3, 7]


def test_a_talk_is_removed_on_a_second_word(home, export, panel):
    kept = kept_talk(home, ("Who were you?", "Somebody."))
    reader = Reader(panel)
    reader.fire(reader.list, "select", id=kept.id)
    reader.fire(reader.button("Remove …"), "click")
    reader.fire(reader.button("Leave it"), "click")
    assert talks.everyone(home) == [kept]
    reader.fire(reader.button("Remove …"), "click")
    reader.fire(reader.button("Remove it"), "click")
    assert talks.everyone(home) == [] and reader.rows(reader.list) == []
    assert reader.visible(reader.models) and reader.value(reader.open) == ""


def test_what_is_loaded_is_shown_and_unloaded_by_a_click(export, panel):
    reader = Reader(panel).greedy()
    reader.ask("Who are you?")
    reader.wait()
    reader.refresh()
    loaded = reader.find(style="k-loaded-list")
    shown = {each["id"]: each["words"] for each in reader.value(loaded)["columns"]}
    assert set(shown) == {f"{export.id}:q4_k_m", f"{export.id}:q6_k"} and all("MB" in words for words in shown.values())
    pids = {each.column: each.pid for each in panel.pool.view().loaded}
    for column, pid in pids.items():
        reader.fire(loaded, "select", id=column)
        until(lambda pid=pid: queue.ticks(pid) is None)
    assert reader.value(loaded)["columns"] == [] and not slot.is_held(panel.home, "gpu-0")


def test_a_run_that_waits_for_the_gpu_is_announced_kept_waiting_and_let_in(home, export, panel, monkeypatch):
    monkeypatch.setattr(queue, "WORKER", "practice")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)]))
    reader = Reader(panel).greedy()
    reader.ask("Who are you?")
    reader.wait()
    run = queue.submit(home, "steps", recipe={"of": 3}, who="test")
    until(lambda: panel.pool.view().wanted_by)
    reader.refresh()
    keep = reader.button("Five more minutes")
    assert f"Run <b>{run.id.split('-', 2)[2]}</b> waits for the GPU" in reader.html()
    reader.fire(keep, "click")
    assert (panel.pool.view().gives_way_in or 0) > pool.NOTICE
    reader.fire(reader.button("Give it the GPU now"), "click")
    assert queue.wait(home, run.id, PATIENCE).state in ENDED
    until(lambda: not slot.is_held(home, "supervisor"))
    reader.refresh()
    assert not reader.visible(keep)


def test_the_bare_base_is_made_by_a_button_and_then_offered(home, export, panel):
    reader = Reader(panel)
    reader.fire(reader.button("Make the base's file"), "click")
    (errand,) = [each for each in errands.everyone(home) if each.kind == "base"]
    assert errand.request == {"export": export.id}
    if errand.status().state not in ENDED:
        assert "Making the base's file" in reader.html() and reader.button("Stop making it")
    status = errands.wait(home, errand.id, PATIENCE)
    assert status.state == "succeeded", status.reason
    reader.refresh()
    assert "Make the base's file" not in [
        reader.shows[b._id]["value"]
        for b in reader.page.blocks.values()
        if isinstance(b, gr.Button) and reader.visible(b)
    ]
    labels = [label for label, _ in reader.shows[reader.models._id]["choices"]]
    assert [label for label in labels if label.startswith("base")] == ["base, q6_k"]


def test_nothing_that_was_said_goes_into_the_page_as_html(home, export, panel):
    kept = kept_talk(home, (HOSTILE, HOSTILE), system=HOSTILE)
    reader = Reader(panel)
    reader.fire(reader.list, "select", id=kept.id)
    (shown,) = reader.talk()
    assert shown["question"] == HOSTILE and shown["answers"][0]["text"] == HOSTILE
    assert "<img" not in reader.html() and "&lt;img" in reader.html()


def test_a_transcript_is_downloaded_by_the_operator_alone(home, serving):
    kept = kept_talk(home, (HOSTILE, "Yes."))
    served: Served = serving(home)
    address = f"/operator/files/talks/{kept.id}"
    with served.client("operator") as client:
        given = client.get(f"{address}.json")
        assert given.json()["rounds"][0]["question"] == HOSTILE
        assert given.headers["content-disposition"] == f'attachment; filename="talk-{kept.id}.json"'
        assert HOSTILE in client.get(f"{address}.md").text
        for made_up in (f"{address}.html", "/operator/files/talks/none.json", "/operator/files/talks/%2e%2e.json"):
            assert client.get(made_up).status_code in (400, 404)
    with served.client("reviewer") as client:
        assert client.get(f"{address}.json").status_code == 403
    assert httpx.get(served.address + address + ".md").status_code in (303, 401)


def test_a_person_asks_reloads_and_reads_on_in_a_browser(home, export, serving, browser):
    kept_talk(home, (HOSTILE, HOSTILE), system=HOSTILE)
    served: Served = serving(home)
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    served.log_in(page)
    # From elsewhere, as a link that was kept: at this width the tab stands behind "…".
    page.goto("about:blank")
    page.goto(f"{served.address}/operator/#chat")
    page.get_by_role("cell", name="onerror").first.click()
    page.locator(".k-answer .k-text").wait_for()
    assert page.locator(".k-answer .k-text").text_content() == HOSTILE
    assert page.locator(".k-asked .k-text").text_content() == HOSTILE
    assert page.locator(".k-talk img").count() == 0 and alerts == []

    page.get_by_role("button", name="New talk").click()
    question = page.get_by_label("Question", exact=True)
    page.get_by_text("Models to talk to").wait_for()
    question.fill("Where do you")
    question.press("Shift+Enter")
    assert question.input_value() == "Where do you\n"
    question.fill("Where do you live?")
    question.press("Enter")
    page.get_by_text("All 2 answered.").wait_for(timeout=PATIENCE * 1000)
    assert question.input_value() == ""
    assert page.locator(".k-answer").count() == 2
    assert page.locator(".k-act:visible", has_text="Bring").count() == 0

    page.reload()
    page.locator(".k-asked", has_text="Where do you live?").wait_for()
    page.get_by_text("All 2 answered.").wait_for()
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    other = context.new_page()  # another tab has a talk of its own open, or none
    other.goto(f"{served.address}/operator/#chat")
    other.get_by_text("Models to talk to").wait_for()
    assert other.locator(".k-answer").count() == 0
    context.close()
