"""What happens at the edge of a page: errors become messages, bugs references, and what keeps a person waiting is
noted. And that nothing does, with hundreds of past runs and one of 50,000 steps."""

import functools
import logging
import time
from types import ModuleType

import gradio as gr
import pytest
from visitor import Visitor

from bench.past import write_past
from katherine.errors import DataError
from katherine.settings import Home
from ui import edge, history, operator, strip, train
from ui.panel import Panel


def test_an_error_of_ours_is_its_message_escaped_and_a_bug_a_reference_to_the_log(caplog):
    def wrong(bug: bool) -> None:
        raise ZeroDivisionError("secret") if bug else DataError("<img src=x> in\nline 3")

    with pytest.raises(gr.Error) as said:
        edge.shown(wrong)(False)
    assert said.value.message == "&lt;img src=x&gt; in<br>line 3"
    with pytest.raises(gr.Error) as said:
        edge.shown(wrong)(True)
    reference = said.value.message.removesuffix(".").rpartition(" ")[2]
    assert "ZeroDivisionError" in said.value.message and "secret" not in said.value.message
    assert f"bug {reference} in" in caplog.text and "secret" in caplog.text


def test_a_handler_that_keeps_a_person_waiting_is_noted_with_its_name(caplog, monkeypatch):
    monkeypatch.setattr(edge, "SLOW", 0.05)

    def handler(seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    with caplog.at_level(logging.WARNING, "katherine.ui"):
        assert edge.shown(handler)(0) == "done" and caplog.text == ""
        assert edge.shown(handler)(0.1) == "done"
    assert "handler took 0.1" in caplog.text


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Panel:
    home = Home(tmp_path_factory.mktemp("full") / "home")
    write_past(home, runs=500, steps=50_000)
    return Panel.of(home)


@pytest.mark.parametrize("module", [strip, *operator.TABS], ids=lambda module: module.__name__.partition(".")[2])
def test_no_look_at_a_full_home_takes_a_second_of_the_processor_not_even_the_first(full, module: ModuleType):
    tab = Visitor(module, full)
    spent: list[float] = []
    for function in tab.page.fns.values():
        function.fn = _timed(function.fn, spent)
    for _ in range(3):
        tab.refresh()
    assert len(spent) >= 3 and max(spent) < edge.SLOW, spent


def test_no_choice_of_a_run_takes_a_second_of_the_processor(full):
    spent: list[float] = []
    longest = max(full.history.runs(), key=lambda seen: seen.status.step)
    other = next(seen for seen in full.history.runs() if seen.kind == "sft" and seen is not longest)
    watching, looking = Visitor(train, full), Visitor(history, full)
    for tab in (watching, looking):
        tab.refresh()
        for function in tab.page.fns.values():
            function.fn = _timed(function.fn, spent)
    watching.choose(watching.find(label="Run shown"), longest.id)
    watching.choose(watching.find(label="Lay past runs over"), [other.id])
    watching.choose(watching.find(label="Search the log"), "nowhere", "submit")
    looking.fire(looking.find(style="k-all-runs"), "select", id=longest.id)
    looking.choose(looking.find(label="Compare with"), other.id, "input")
    assert len(spent) >= 5 and max(spent) < edge.SLOW, spent


def _timed(handler, spent: list[float]):
    """The handler, which notes the seconds that its thread had of a processor: what others take is not its own."""

    @functools.wraps(handler)
    def timed(*given, **named):
        began = time.thread_time()
        try:
            return handler(*given, **named)
        finally:
            spent.append(time.thread_time() - began)

    return timed
