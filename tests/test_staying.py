"""What a person arranged stays as it is while data arrives, in a real browser: the zoom of a figure, the order of a
table, the place of everything on the page. And what belonged to another run goes when another is chosen."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from people import PHONE, WIDE, Person, until

from bench.past import DPO_STEPS, write_past
from jobs import queue
from katherine import runs
from katherine.runs import Run, State
from katherine.settings import Home

pytestmark = pytest.mark.browser

TABS = ("dataset", "recipe", "train", "export", "chat", "probes", "review", "publish", "history")
# The last step that a figure has drawn, and the steps that it shows, of the first figure in sight.
DRAWN = """() => {
  const plot = [...document.querySelectorAll('.k-plot')].find((one) => one.offsetParent && one._fullLayout);
  return plot && { last: plot._fullData.at(-1).x.at(-1), shown: plot._fullLayout.xaxis.range };
}"""
# Of each figure in sight: the last step drawn, where the axis ends, and whether the picture has the traces of the data.
EVERY = """() => [...document.querySelectorAll('.k-plot')].filter((one) => one.offsetParent && one._fullLayout).map(
  (plot) => ({
    last: Math.max(...plot._fullData.map((trace) => trace.x.at(-1))),
    end: plot._fullLayout.xaxis.range[1],
    whole: plot.querySelectorAll('.scatterlayer .trace').length === plot._fullData.length,
  }))"""
# What moved without anybody having touched the page: the browser's own measure, with what it was.
WATCH = """() => {
  window.moved = [];
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      if (entry.hadRecentInput) continue;
      for (const { node } of entry.sources) {
        window.moved.push([entry.value, node?.nodeName + '.' + (node?.parentElement?.className || '')]);
      }
    }
  }).observe({ type: 'layout-shift', buffered: false });
}"""


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def at_the_panel(browser, serving, home) -> Iterator[Callable[..., Person]]:
    served, people = serving(home), []

    def sit_down(**context: Any) -> Person:
        people.append(Person(browser, served, **context))
        return people[-1]

    yield sit_down
    for person in people:
        person.close()


def go_on(run: Run, steps: int = 1) -> int:
    """The run logs further steps; the last one's number."""
    *_, last = run.metrics()
    rows = [
        last | {"step": last["step"] + more, "seconds": last["seconds"] + 1.4 * more, "time": runs.now()}
        for more in range(1, steps + 1)
    ]
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["step"]


def test_a_zoom_is_kept_while_the_run_goes_on(home, at_the_panel):
    (run,) = write_past(home, runs=1, steps=300, datasets=1)
    me = at_the_panel()
    me.open("train")
    until(lambda: me.page.evaluate(DRAWN), 15, "nothing was drawn")
    whole = me.page.evaluate(DRAWN)["shown"]
    assert whole[0] < 100 and whole[1] > 250
    box = me.page.locator(".k-plot .nsewdrag").locator("visible=true").first
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    middle = place["y"] + place["height"] / 2
    me.page.mouse.move(place["x"] + place["width"] * 0.25, middle)
    me.page.mouse.down()
    me.page.mouse.move(place["x"] + place["width"] * 0.5, middle, steps=8)
    me.page.mouse.up()
    until(lambda: me.page.evaluate(DRAWN)["shown"] != whole, 5, "dragging did not zoom")
    zoomed = me.page.evaluate(DRAWN)["shown"]
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    for _ in range(2):
        newest = go_on(run, 40)
        until(lambda newest=newest: me.page.evaluate(DRAWN)["last"] == newest, 15, "what came is not drawn")
        assert me.page.evaluate(DRAWN)["shown"] == zoomed
    me.page.locator(".k-plot").locator("visible=true").first.dblclick()
    until(lambda: me.page.evaluate(DRAWN)["shown"][1] >= newest, 5, "a double click does not show the whole again")
    assert me.complaints == []


def test_when_another_run_is_shown_every_figure_is_drawn_anew(home, at_the_panel):
    write_past(home, runs=2, steps=300, datasets=1)
    me = at_the_panel()
    me.open("train")

    def all_end_at(steps: int, figures: int) -> bool:
        found = me.page.evaluate(EVERY)
        return len(found) == figures and all(
            each["whole"] and each["last"] == steps and steps <= each["end"] < steps * 1.2 for each in found
        )

    # The newest, DPO, then each by choice.
    until(lambda: all_end_at(DPO_STEPS, 8), 15, "DPO is not drawn")
    for kind, steps, figures in (("sft", 300, 5), ("dpo", DPO_STEPS, 8), ("sft", 300, 5)):
        me.page.get_by_label("Run shown").click()
        me.page.get_by_role("option").filter(has_text=kind).first.click()
        until(lambda: all_end_at(steps, figures), 15, f"{kind} is not drawn: {me.page.evaluate(EVERY)}")  # noqa: B023
    assert me.complaints == []


def test_a_table_keeps_the_order_that_was_chosen_when_a_row_comes(home, at_the_panel):
    write_past(home, runs=12, steps=40, datasets=1)
    me = at_the_panel()
    me.open("history")
    table = me.page.locator(".k-all-runs")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()

    table.locator("tbody tr").first.wait_for()
    heads = table.locator("th").all_inner_texts()
    kind = heads.index("Kind") + 1
    newest_first = column(1)
    table.get_by_role("button", name="Kind").click()
    assert column(kind) == sorted(column(kind)) and column(1) != newest_first
    table.get_by_role("button", name="Kind").click()
    assert column(kind) == sorted(column(kind), reverse=True)
    run = runs.create(home, "export", recipe={}, who="test")
    table.locator("tr", has_text=run.id[-10:]).first.wait_for()
    assert column(kind) == sorted(column(kind), reverse=True)
    assert table.locator("th", has_text="Kind").get_attribute("aria-sort") == "descending"
    # Numbers are ordered as numbers, the largest first, and what has none comes last.
    table.get_by_role("button", name="Steps").click()
    shown = column(heads.index("Steps") + 1)
    known = [int(text.replace(",", "")) for text in shown if text]
    assert known == sorted(known, reverse=True) and shown[len(known) :] == [""] * (len(shown) - len(known))


@pytest.fixture
def under_way(home) -> Callable[[], None]:
    """A home with a past and a run under way, this process being its supervisor. Called, the run makes a step."""
    *_, run = write_past(home, runs=41, steps=400, datasets=2)
    mine = {"supervisor": os.getpid(), "supervisor_started": queue.ticks(os.getpid()), "machine": queue.machine()}
    began = {"started": runs.now(), "phase_began": runs.now(), "ended": None, "exit_code": None}
    run.set_status(state=State.running, phase="train", pid=os.getpid(), step=10, of=400, reason="", remedy="",
                   **mine, **began)  # fmt: skip

    def step() -> None:
        run.set_status(step=go_on(run))
        with run.log.open("a") as log:
            log.write("another step\n")

    return step


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_every_tab_fits_its_window_and_stays_put_while_it_updates(under_way, at_the_panel, size, scheme):
    me = at_the_panel(viewport=WIDE if size == "wide" else PHONE, color_scheme=scheme)
    for tab in TABS:
        me.open(tab)
        me.page.wait_for_timeout(2500)  # until it has come to rest
        width = me.page.evaluate("document.documentElement.scrollWidth")
        assert width <= me.page.viewport_size["width"], f"{tab} is {width} pixels wide"
        me.page.evaluate(WATCH)
        for _ in range(3):
            under_way()
            me.page.wait_for_timeout(1400)
        # The browser calls 0.1 in all good; one line that jumps by its own height is some 0.001.
        moved = me.page.evaluate("window.moved")
        assert sum(value for value, _ in moved) < 0.001, (tab, moved)
        me.picture(f"{tab}-{size}-{scheme}")
    assert me.complaints == []
