"""The train tab through Gradio's own machinery, on real run folders, a real queue and real (light) workers: a visitor
presses what a person would press, and keeps what a page keeps."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import practice_training
import pytest
from gradio.state_holder import SessionState
from visitor import as_drawn

from bench.past import write_past
from jobs import pipeline, queue, slot
from katherine import drafts, runs
from katherine.errors import RecipeError
from katherine.runs import ENDED, Run, State
from katherine.settings import PROJECT, Home
from ui import train
from ui.panel import Panel

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 30.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Seven past families (one of them failed) and their datasets, of which one is drafted with the demo's recipes."""
    monkeypatch.setattr(queue, "WORKER", "practice_training")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)]))
    monkeypatch.setenv("KATHERINE_HOME", str(tmp_path / "home"))
    home = Home(tmp_path / "home")
    write_past(home, runs=28, steps=300, datasets=2)
    drafts.use_preset(home, "demo")
    drafts.change(home, dataset=sorted(path.name for path in home.datasets.iterdir())[0])
    yield home
    for run, _ in queue.unfinished(home):
        queue.stop(home, run.id, kill=True)
    until(lambda: not slot.is_held(home, "supervisor") and not slot.is_held(home, "gpu-0"))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Visitor:
    """One open page: what each of its components shows, and what it may press."""

    def __init__(self, home: Home):
        self.panel = Panel.of(home)
        with gr.Blocks() as self.page:
            self.tab = train._Page(self.panel)
        self.session = SessionState(self.page)
        self.shows: dict[int, dict[str, Any]] = {}
        for block in self.page.blocks.values():
            config = block.get_config()
            self.shows[block._id] = {name: config.get(name) for name in ("value", "choices", "interactive", "visible")}
        self.sent = 0
        self.refresh()

    def value(self, name: str) -> Any:
        block = getattr(self.tab, name)
        return as_drawn(block, self.shows[block._id]["value"])

    def property(self, name: str, key: str) -> Any:
        return self.shows[getattr(self.tab, name)._id][key]

    def choose(self, name: str, value: Any) -> None:
        self.shows[getattr(self.tab, name)._id]["value"] = value

    def refresh(self, lost: bool = False) -> set[str]:
        """The names of the components that were sent something. lost: the answer never arrives."""
        return self._fire(self._function("_refresh"), lost=lost)

    def press(self, name: str, event: str = "click", data: Any = None) -> None:
        """As in the browser: what follows upon success follows."""
        component = getattr(self.tab, name)
        (function,) = [
            each for each in self.page.fns.values() if (component._id, event) in each.targets and each.fn is not None
        ]
        self._fire(function, data)
        for each in self.page.fns.values():
            if each.trigger_after == function._id and each.fn is not None:
                self._fire(each)

    def can_press(self, name: str) -> bool:
        return self.property(name, "interactive") is not False

    def drawn(self) -> dict[str, Any]:
        return {
            name: as_drawn(figure, self.shows[figure._id]["value"])
            for name, figure in self.tab.figures.items()
            if self.shows[figure._id]["visible"]
        }

    def _function(self, name: str) -> Any:
        return next(each for each in self.page.fns.values() if getattr(each.fn, "__name__", "") == name)

    def _fire(self, function: Any, data: Any = None, lost: bool = False) -> set[str]:
        given = [self.shows[block._id]["value"] for block in function.inputs]
        event = gr.EventData(None, data) if data is not None else None
        answer = asyncio.run(self.page.process_api(function, given, self.session, event_data=event))
        names = {part._id: name for name, part in vars(self.tab).items() if isinstance(part, gr.blocks.Block)}
        names |= {figure._id: name for name, figure in self.tab.figures.items()}
        told = set()
        for block, new in zip(function.outputs, answer["data"], strict=True):
            if isinstance(new, dict) and new.get("__type__") == "update":
                # To gr.HTML Gradio also sends empty "props".
                changes = {key: value for key, value in new.items() if key not in ("__type__", "props")}
            else:
                changes = {"value": new}
            if changes:
                told.add(names[block._id])
            if not lost:
                self.shows[block._id] |= {key: changes[key] for key in changes.keys() & {*self.shows[block._id]}}
        return told


@pytest.fixture
def visitor(home: Home) -> Visitor:
    return Visitor(home)


def state_of(home: Home, run_id: str) -> State:
    return runs.load(home, run_id).status().state


def unfinished(home: Home) -> list[Run]:
    return [run for run, _ in queue.unfinished(home)]


def long_sft(home: Home) -> None:
    draft = drafts.load(home)
    drafts.set_recipe(home, "sft", draft.values["sft"] | {"num_train_epochs": 50})


def under_way(home: Home, step: int = 2) -> Run:
    until(lambda: any(s.state is State.running and s.step >= step for _, s in queue.unfinished(home)))
    return next(run for run, s in queue.unfinished(home) if s.state is State.running)


def test_a_page_with_nothing_at_all_says_what_to_do(tmp_path):
    visitor = Visitor(Home(tmp_path / "empty"))
    assert "No dataset is chosen" in visitor.value("draft") and "No run yet" in visitor.value("chosen")
    assert visitor.drawn() == {}
    assert not any(map(visitor.can_press, ("start_sft", "start_pipeline", "start_dpo", "stop", "kill", "resume")))
    assert visitor.refresh() == set()


def test_what_is_about_to_be_started_is_said_with_what_differs(home, visitor):
    dataset = drafts.load(home).dataset
    assert f"<b>{dataset}</b>" in visitor.value("draft") and "<b>demo</b>" in visitor.value("draft")
    assert "Changed" not in visitor.value("draft")
    drafts.set_recipe(home, "sft", drafts.load(home).values["sft"] | {"lora_r": 32})
    visitor.refresh()
    assert "SFT: LoRA rank 32 instead of 64" in visitor.value("draft")


def test_start_sft_makes_one_run_and_shows_it(home, visitor):
    long_sft(home)
    visitor.press("start_sft")
    (run,) = unfinished(home)
    assert (run.record.kind, run.record.who) == ("sft", "operator")
    assert run.id in visitor.value("chosen") and visitor.value("picker") == train.FOLLOW
    under_way(home)
    visitor.refresh()
    assert "Running: train" in visitor.value("chosen")
    assert "loss" in visitor.drawn() and "margin" not in visitor.drawn()
    # A second click, and another tab's, find it under way.
    visitor.press("start_sft")
    Visitor(home).press("start_sft")
    assert unfinished(home) == [run]


def test_a_reload_and_a_second_tab_show_the_run_at_once_and_start_nothing(home, visitor):
    long_sft(home)
    visitor.press("start_sft")
    run = under_way(home)
    for again in (Visitor(home), Visitor(home)):
        assert run.id in again.value("chosen") and again.drawn()["loss"]
        assert [row for row in again.value("queued")["ids"]] == [run.id]
    assert unfinished(home) == [run]


def test_the_whole_pipeline_is_queued_in_one_click_and_followed_to_its_end(home, visitor):
    visitor.press("start_pipeline")
    queued = unfinished(home)
    assert [run.record.kind for run in queued] == ["sft", "dpo", "export", "probe"]
    assert [run.record.parent for run in queued] == [None, *(run.id for run in queued[:-1])]
    assert len(visitor.value("queued")["rows"]) == 4
    seen = set()
    until(lambda: (visitor.refresh(), seen.add(visitor.value("seen")["run"]), not unfinished(home))[-1])
    visitor.refresh()
    assert {state_of(home, run.id) for run in queued} == {State.succeeded}
    assert {queued[0].id, queued[1].id} <= seen  # the page went along
    assert "Succeeded" in visitor.value("chosen")


def test_what_stands_in_the_way_is_said_before_anything_is_queued(home, visitor):
    draft = drafts.load(home)
    drafts.set_recipe(home, "export", draft.values["export"] | {"quants": ["q9_x"]})
    visitor.refresh()
    assert "q9_x" in visitor.value("draft") and "k-bad" in visitor.value("draft")
    with pytest.raises(gr.Error, match="q9_x"):
        visitor.press("start_pipeline")
    assert unfinished(home) == []


def test_dpo_starts_on_a_chosen_sft_run(home, visitor):
    offered = [run_id for _, run_id in visitor.property("on", "choices")]
    assert visitor.value("on") == offered[0]
    assert {state_of(home, run_id) for run_id in offered} == {State.succeeded}
    visitor.choose("on", offered[2])
    visitor.refresh()
    assert visitor.value("on") == offered[2]
    visitor.press("start_dpo")
    (run,) = [each for each in runs.everyone(home) if each.record.who == "operator"]
    assert (run.record.kind, run.record.parent) == ("dpo", offered[2])
    assert run.record.dataset == drafts.load(home).dataset
    until(lambda: state_of(home, run.id) is State.succeeded)
    visitor.refresh()
    assert visitor.drawn().keys() == set(train.plots.NAMES) and visitor.drawn()["margin"]


def test_stop_keeps_and_resume_goes_on_from_there(home, visitor):
    long_sft(home)
    visitor.press("start_sft")
    run = under_way(home)
    visitor.refresh()
    assert [visitor.can_press(name) for name in ("stop", "kill", "resume")] == [True, True, False]
    visitor.press("stop")
    assert not visitor.can_press("stop")
    until(lambda: run.status().state is State.cancelled)
    kept = run.status().step
    visitor.refresh()
    assert "Stopped by you; kept at step" in visitor.value("chosen")
    assert [visitor.can_press(name) for name in ("stop", "kill", "resume")] == [False, False, True]
    visitor.press("resume")
    until(lambda: run.status().state is State.running and run.status().step > kept)
    visitor.refresh()
    assert run.status().attempt == 2 and run.id in visitor.value("chosen")


def test_kill_asks_first_and_kills_the_run_it_asked_about(home, visitor):
    long_sft(home)
    visitor.press("start_sft")
    run = under_way(home)
    visitor.refresh()
    visitor.press("kill")
    assert visitor.property("confirm", "visible") and run.id in visitor.value("condemned")
    assert run.status().state is State.running
    visitor.press("let_live")
    assert not visitor.property("confirm", "visible") and run.status().state is State.running
    visitor.press("kill")
    # Meanwhile another one is chosen to look at.
    visitor.choose("picker", runs.everyone(home)[0].id)
    visitor.refresh()
    visitor.press("kill_now")
    until(lambda: run.status().state in ENDED)
    # Killed, or, where its step ended in the very moment before, stopped by the same request and kept.
    assert run.status().reason.startswith("Stopped by you") and not visitor.property("confirm", "visible")


def test_stop_means_the_run_that_is_shown_and_not_the_one_that_came_after(home, visitor):
    long_sft(home)
    visitor.press("start_pipeline")
    sft = unfinished(home)[0]
    under_way(home)
    visitor.refresh()
    queue.stop(home, sft.id, kill=True)
    until(lambda: sft.status().state in ENDED)
    other = queue.submit(home, "steps", recipe={"of": 10_000, "seconds": 0.01}, who="test")
    until(lambda: other.status().state is State.running)
    visitor.press("stop")  # the page still shows the first
    assert not queue.control(other).exists()


def test_a_failure_says_what_happened_in_large_escaped_words(home, visitor):
    draft = drafts.load(home)
    drafts.set_recipe(home, "sft", draft.values["sft"] | {"seed": practice_training.FAILS})
    visitor.press("start_sft")
    until(lambda: not unfinished(home))
    visitor.refresh()
    page = visitor.value("chosen")
    assert "Failed" in page and "k-reason k-bad" in page
    assert "talk.jsonl, line 3: &lt;b&gt;no&lt;/b&gt; messages. Mend the line." in page
    assert visitor.can_press("resume") and visitor.can_press("rerun")


def test_rerun_with_changes_loads_the_runs_recipe_and_dataset(home, visitor):
    past = next(run for run in runs.everyone(home) if run.record.recipe.get("learning_rate") == 2e-4)
    drafts.change(home, dataset=None)
    visitor.choose("picker", past.id)
    visitor.refresh()
    visitor.press("rerun")
    draft = drafts.load(home)
    assert draft.values["sft"]["learning_rate"] == 2e-4
    assert (draft.dataset, draft.run) == (past.record.dataset, past.id)


def test_only_what_changed_is_sent(home, visitor):
    assert visitor.refresh() == set()
    long_sft(home)
    visitor.press("start_sft")
    run = under_way(home)
    visitor.refresh()
    sent = visitor.refresh()
    assert "picker" not in sent and "draft" not in sent and "on" not in sent
    queue.stop(home, run.id, kill=True)
    until(lambda: run.status().state in ENDED)
    visitor.refresh()
    assert visitor.refresh() == set()


def test_an_answer_that_was_lost_on_the_way_is_given_again(home, visitor):
    past = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    visitor.choose("picker", past.id)
    lost = visitor.refresh(lost=True)
    assert "loss" in lost and past.id not in visitor.value("chosen")
    assert lost == visitor.refresh()
    assert past.id in visitor.value("chosen") and visitor.drawn()["loss"]
    assert visitor.refresh() == set()


def test_two_tabs_each_show_their_own_choice(home, visitor):
    other = Visitor(home)
    first, second = [run for run in runs.everyone(home) if run.record.kind == "sft"][:2]
    for page, run in ((visitor, first), (other, second)):
        page.choose("picker", run.id)
        page.refresh()
    assert first.id in visitor.value("chosen") and second.id in other.value("chosen")
    assert visitor.refresh() == other.refresh() == set()


def test_past_runs_of_the_same_kind_are_laid_over_by_choice(home, visitor):
    sft = [run for run in runs.everyone(home) if run.record.kind == "sft"]
    dpo = next(run for run in runs.everyone(home) if run.record.kind == "dpo")
    visitor.choose("picker", sft[0].id)
    visitor.refresh()
    offered = [run_id for _, run_id in visitor.property("past", "choices")]
    assert sft[0].id not in offered and dpo.id not in offered and sft[1].id in offered
    alone = len(visitor.drawn()["loss"]["data"])
    visitor.choose("past", [sft[1].id, sft[2].id])
    visitor.refresh()
    assert len(visitor.drawn()["loss"]["data"]) == alone + 2
    # What is no run, or of another kind, is left out and breaks nothing.
    visitor.choose("past", ["../../etc", dpo.id, sft[0].id])
    visitor.refresh()
    assert len(visitor.drawn()["loss"]["data"]) == alone


def test_the_slider_smooths(home, visitor):
    sft = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    visitor.choose("picker", sft.id)
    visitor.choose("smoothing", 0)
    visitor.refresh()
    assert len(visitor.drawn()["loss"]["data"]) == 1
    visitor.choose("smoothing", 0.9)
    assert "loss" in visitor.refresh()
    assert len(visitor.drawn()["loss"]["data"]) == 2


def test_the_log_is_text_and_can_be_searched_and_downloaded(home, visitor):
    long_sft(home)
    visitor.press("start_sft")
    run = under_way(home)
    visitor.refresh()
    assert "loading <b>a base</b>" in visitor.value("log")["text"]  # set as text by the page's script, never as HTML
    assert f"/operator/files/runs/{run.id}/log.txt" in visitor.value("log_link")
    visitor.choose("wanted", "LOADING")
    visitor.press("wanted", "submit")
    assert "<code>loading &lt;b&gt;a base&lt;/b&gt;</code>" in visitor.value("found")
    visitor.choose("wanted", "<i>nowhere")
    visitor.press("wanted", "submit")
    assert "“&lt;i&gt;nowhere” is not in the log" in visitor.value("found")


def test_a_search_goes_on_in_the_run_in_which_it_began(home, visitor):
    past = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    past.log.write_text("".join(f"hit {n}\n" for n in range(1, 251)))
    visitor.choose("picker", past.id)
    visitor.refresh()
    visitor.choose("wanted", "hit")
    visitor.press("wanted", "submit")
    assert visitor.property("search_on", "visible") and "value='1'" in visitor.value("found")
    visitor.press("search_on")
    assert "value='101'" in visitor.value("found") and "value='100'" not in visitor.value("found")
    visitor.press("search_on")
    assert "hit 250" in visitor.value("found") and not visitor.property("search_on", "visible")


def test_a_queued_row_can_be_chosen_and_says_what_it_waits_for(home, visitor):
    long_sft(home)
    visitor.press("start_pipeline")
    sft, dpo, *_ = unfinished(home)
    visitor.press("queued", "select", {"id": dpo.id})
    assert visitor.value("picker") == dpo.id
    visitor.refresh()
    assert f"It begins when run {sft.id} has succeeded." in visitor.value("chosen")
    with pytest.raises(gr.Error, match="no run"):
        visitor.press("queued", "select", {"id": "../../etc/passwd"})


def test_a_run_that_is_gone_is_said_to_be(home, visitor):
    visitor.choose("picker", "20260101-000000-sft-abcdef")
    visitor.refresh()
    assert "That run is gone" in visitor.value("chosen") and visitor.drawn() == {}
    with pytest.raises(gr.Error, match="choose one"):
        visitor.press("resume")


def test_a_damaged_run_does_not_take_the_page_down(home, visitor):
    run = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    (run.path / "status.json").write_text("{")
    (run.path / "metrics.jsonl").write_bytes(b"\xff\xfe{{{\n")
    visitor.choose("picker", run.id)
    visitor.refresh()
    assert "is damaged" in visitor.value("chosen")


# --------------------------------------------------------------------------- the operations, without any page


def test_a_hundred_simultaneous_starts_from_several_processes_make_one_pipeline(home):
    long_sft(home)
    begin = home.root / "begin"
    code = (
        "import pathlib, threading, time\n"
        "from jobs import pipeline, queue\n"
        "from katherine import drafts\n"
        "from katherine.settings import home\n"
        "queue.WORKER = 'practice_training'\n"
        f"begin, draft = pathlib.Path({str(begin)!r}), drafts.load(home())\n"
        "def ask():\n"
        "    while not begin.exists(): time.sleep(0.001)\n"
        "    queued = pipeline.start(home(), draft.dataset, who='test', **draft.asked())\n"
        "    print(' '.join(run.id for run in queued) + chr(10), end='')\n"
        "threads = [threading.Thread(target=ask) for _ in range(25)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
    )
    askers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    time.sleep(2)
    begin.touch()
    answers = [line for asker in askers for line in asker.communicate(timeout=90)[0].splitlines()]
    assert len(answers) == 100 and len(set(answers)) == 1
    assert [run.id for run in unfinished(home)] == answers[0].split()
    under_way(home)


def test_a_hundred_clicks_on_one_page_make_one_run(home):
    long_sft(home)
    page = Visitor(home)
    clicks = [threading.Thread(target=page.press, args=["start_sft"]) for _ in range(100)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert len(unfinished(home)) == 1


def test_what_builds_on_a_run_is_queued_on_it(home):
    sft = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    dpo, export = pipeline.start_on(home, sft.id, {"export": {}, "dpo": {}}, "test")
    assert (dpo.record.parent, export.record.parent) == (sft.id, dpo.id)
    assert dpo.record.dataset == sft.record.dataset and dpo.record.inputs == sft.record.inputs
    (alone,) = pipeline.start_on(home, sft.id, {"export": {}}, "test")
    assert alone.record.parent == sft.id and alone.id != export.id
    assert pipeline.start_on(home, sft.id, {"export": {}}, "test") == [alone]


def test_what_cannot_build_on_a_run_is_refused_in_words_and_queues_nothing(home):
    every = runs.everyone(home)
    sft = next(run for run in every if run.record.kind == "sft")
    dpo = next(run for run in every if run.record.kind == "dpo" and run.status().state is State.succeeded)
    failed = next(run for run in every if run.status().state is State.failed)
    for parent, recipes, words in (
        (dpo, {"dpo": {}}, "dpo: it builds on a run of sft, not of dpo"),
        (sft, {"sft": {}}, "sft: it begins with the base"),
        (sft, {"probe": {}}, "queue the export as well"),
        (failed, {"dpo": {}}, "was failed, so that there is nothing to build on"),
        (sft, {}, "No stage was asked for"),
        (sft, {"dpo": {"beta": -1}}, "beta"),
        (sft, {"export": {"quants": ["q9_x"]}}, "q9_x"),
    ):
        with pytest.raises(RecipeError, match=words):
            pipeline.start_on(home, parent.id, recipes, "test")
    assert unfinished(home) == []


def test_a_run_is_made_again_with_changes_on_the_same_parent_and_dataset(home):
    dpo = next(run for run in runs.everyone(home) if run.record.kind == "dpo" and run.status().state is State.succeeded)
    again = pipeline.again(home, dpo.id, {"beta": 0.3}, "test")
    assert again.record.recipe == dpo.record.recipe | {"beta": 0.3}
    assert (again.record.parent, again.record.dataset) == (dpo.record.parent, dpo.record.dataset)
    sft = runs.load(home, dpo.record.parent)
    fresh = pipeline.again(home, sft.id, {"load_in_4bit": False}, "test")
    assert fresh.record.parent is None and fresh.id != sft.id
    with pytest.raises(RecipeError, match="no_such_field"):
        pipeline.again(home, dpo.id, {"no_such_field": 1}, "test")


def test_a_start_while_an_equal_run_is_being_stopped_is_a_new_run(home):
    long_sft(home)
    draft = drafts.load(home)
    (first,) = pipeline.start(home, draft.dataset, draft.values["sft"], None, None, "test")
    under_way(home)
    queue.stop(home, first.id)
    (second,) = pipeline.start(home, draft.dataset, draft.values["sft"], None, None, "test")
    assert second.id != first.id
