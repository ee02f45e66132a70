import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from test_autostop import ENDLESS, ask, becomes, enable, home, until  # noqa: F401  (home is a fixture)
from test_pod import RunPod, runpod  # noqa: F401  (a fixture)
from test_telemetry import H200, STARVED, recorded
from visitor import Visitor

from jobs import autostop, slot
from jobs.autostop import Phase
from katherine import disk, prices, runs
from katherine.errors import SetupError
from katherine.gpu import GpuReading
from katherine.pace import Pace
from katherine.runs import State
from katherine.settings import Home
from katherine.telemetry import Watch
from ui import strip
from ui.panel import Panel


class Page:
    """The strip as one visitor has it, over cards that say what the test wants."""

    def __init__(self, at: Home, cards: list[GpuReading] | Exception):
        self.cards = cards
        self.watch = Watch(in_use=lambda index: not slot.free(at, [str(index)]), read=self._read, every=0.01)
        self.panel = replace(Panel.of(at), watch=self.watch)
        self.visitor = Visitor(strip, self.panel)

    def _read(self) -> list[GpuReading]:
        if isinstance(self.cards, Exception):
            raise self.cards
        return self.cards

    def html(self) -> str:
        self.visitor.refresh()
        return self.visitor.html()


@pytest.fixture
def page(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Page]]:
    """Makes pages, each with its watch running: of a machine that is no pod, unless the test has the home of one."""
    if "home" not in request.fixturenames:
        monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    made = []

    def make(cards: list[GpuReading] | Exception, at: Home | None = None) -> Page:
        one = Page(at or Home(tmp_path / "home"), cards)
        made.append(one)
        one.watch.start()
        until(lambda: one.watch.latest() is not None)
        return one

    yield make
    for one in made:
        one.watch.stop()


def test_an_idle_card_an_empty_queue_and_the_disk(page):
    shown = page([replace(H200, utilisation=3, power=122.3)]).html()
    for text in (
        "NVIDIA H200",
        "3%",
        "5.0 / 140 GiB",
        "122 / 700 W",
        "Nothing is running",
        "the queue is empty",
        "free",
    ):
        assert text in shown
    assert "so far" not in shown and "shared" not in shown  # nobody pays for this machine by the hour


def test_a_machine_without_a_gpu_and_a_driver_that_does_not_answer_say_so(page):
    assert "No GPU" in page([]).html()
    broken = page(SetupError("The NVIDIA driver of this machine does not answer: <GPU is lost>.")).html()
    assert "no answer" in broken and "does not answer: &lt;GPU is lost&gt;." in broken


def test_several_cards_are_one_line_each_and_what_is_not_reported_is_not_invented(page):
    shown = page(
        [H200, replace(H200, index=1, name="NVIDIA <T4>", power=None, memory_used=None, utilisation=None)]
    ).html()
    assert shown.count("k-strip-card") == 2 and "NVIDIA &lt;T4&gt;" in shown
    assert shown.count("not reported") == 3 and "None" not in shown


def test_a_pod_that_looks_shared_is_warned_of(page, monkeypatch):
    one = page([H200])
    monkeypatch.setattr(one.watch, "history", lambda: recorded(STARVED))
    assert "This pod looks shared" in one.html()
    monkeypatch.setattr(one.watch, "history", lambda: recorded(STARVED, in_use=()))
    assert "nothing of this panel runs on it" in one.html()


def test_of_two_gpus_the_run_of_each_is_shown(page):
    one = page([H200, replace(H200, index=1)])
    held = []
    for card, (kind, step) in enumerate((("sft", 3), ("dpo", 7))):
        run = runs.create(one.panel.home, kind, recipe={}, who="test")
        run.set_status(state=State.running, phase="train", attempt=1, pid=1, started=runs.now(), step=step, of=9)
        held.append(slot.take(one.panel.home, kind, run=run.id, name=str(1 - card)))
    runs.create(one.panel.home, "export", recipe={}, who="test")
    shown = one.html()
    for each in held:
        each.release()
    assert shown.count("k-strip-card") == 2 and "<b>GPU 1 · NVIDIA H200</b>" in shown
    assert "GPU 1 · train · step 3 of 9" in shown and "GPU 0 · train · step 7 of 9 · 1 queued" in shown
    assert shown.count("1 queued") == 1


def test_the_run_under_way_shows_its_step_rate_and_time_left(page):
    one = page([H200])
    run = runs.create(one.panel.home, "sft", recipe={}, who="test")
    began = runs.now()
    under_way = {"state": State.running, "phase": "train", "attempt": 1, "pid": 1, "started": began}
    run.set_status(**under_way, phase_began=began, step=0, of=177)
    assert "no step yet" in one.html()
    rows = [
        {"time": runs.now(), "attempt": 1, "step": step, "seconds": step * 1.66, "loss": 0.0, "tokens_per_second": 3000}
        for step in range(1, 9)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.set_status(step=8)
    runs.create(one.panel.home, "dpo", recipe={}, who="test", parent=run.id)
    shown = one.html()
    for text in (
        "SFT",
        "train · step 8 of 177 · 1 queued behind it",
        "1.66 s a step · 3,000 tokens/s · 4 min 4",
        "left",
    ):
        assert text in shown
    run.set_status(state=State.stopping)
    assert "stopping · step 8 of 177" in one.html()
    run.set_status(state=State.interrupted)
    assert "1 queued behind an interrupted run: resume or stop it" in one.html()


def test_a_run_that_makes_no_steps_any_more_is_pointed_out():
    assert Pace(seconds_per_step=1.0, since_step=61.0).stalled
    assert not Pace(seconds_per_step=1.0, since_step=59.0).stalled
    assert not Pace(seconds_per_step=30.0, since_step=200.0).stalled
    assert not Pace(since_step=500.0).stalled


def test_a_disk_that_is_nearly_full_is_warned_of_and_a_quota_is_not_guessed(page, monkeypatch):
    one = page([])
    monkeypatch.setattr(disk, "room", lambda path: disk.Room(9 * 10**9, 50 * 10**9, True))
    assert "Only 9 GB free" in one.html()
    monkeypatch.setattr(disk, "room", lambda path: disk.Room(9 * 10**9, 10**15, False))
    shown = one.html()
    assert "see your quota" in shown and "9 GB" not in shown


def test_on_a_pod_the_dollars_so_far_are_shown_at_the_price_that_was_entered(page, home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RUNPOD_GPU_COUNT", "2")
    one = page([H200], home)
    prices.enter(home, prices.kind(H200.name), 3.5)
    assert "$7.00 an hour" in one.html() and "so far" in one.html()
    unknown = page([replace(H200, name="NVIDIA New Card")], home)
    assert "price not known" in unknown.html()
    prices.path(home).write_text("{")
    assert "prices cannot be read" in one.html()


def test_off_a_pod_there_is_nothing_to_switch(page):
    visitor = page([]).visitor
    assert not visitor.visible(visitor.find(gr.Checkbox))


def test_the_countdown_is_shown_and_the_button_keeps_the_pod(page, home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    one = page([H200], home)
    ask(home, of=1)
    becomes(home, Phase.counting)
    assert "Stopping this pod in" in one.html()
    one.visitor.fire(one.visitor.button("Keep running"), "click")
    assert "Kept running by the operator." in one.visitor.html()
    with pytest.raises(AssertionError):
        one.visitor.button("Keep running")
    assert runpod.asked == [] and autostop.settings(home).enabled


def test_a_refusal_stays_until_somebody_says_that_they_have_seen_it(page, home, runpod):  # noqa: F811
    runpod.status = 403
    enable(home, 0.1)
    one = page([H200], home)
    ask(home, of=1)
    becomes(home, Phase.refused)
    for _ in range(2):
        shown = one.html()
        assert "k-bad" in shown and "Auto-stop failed. RunPod refused to stop the pod: HTTP 403" in shown
    one.visitor.fire(one.visitor.button("I have seen it"), "click")
    assert "Auto-stop failed" not in one.visitor.html()


def test_it_is_switched_on_and_off_and_bad_minutes_are_refused(page, home):  # noqa: F811
    visitor = page([H200], home).visitor
    box, minutes = visitor.find(gr.Checkbox), visitor.find(gr.Number)
    visitor.shows[minutes._id]["value"] = 5
    visitor.choose(box, True, "input")
    assert autostop.settings(home) == autostop.Settings(True, 5.0)
    with pytest.raises(gr.Error, match="1 to 720 minutes"):
        visitor.choose(minutes, 0, "submit")
    visitor.choose(box, False, "input")
    assert not autostop.settings(home).enabled
    autostop.configure(home, True, 5)
    visitor.refresh()
    assert visitor.value(box) is True
