"""Who asks for news, in a real browser: what is in sight, from the first moment, and nothing else."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from exported import exported
from people import Person, until

from katherine.settings import Home

pytestmark = pytest.mark.browser

HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def me(browser, serving, tmp_path) -> Iterator[Any]:
    home = Home(tmp_path / "home")
    person = Person(browser, serving(home))
    person.home = home  # type: ignore[attr-defined]
    yield person
    person.close()


class Ears:
    """The ticks that the page sends, by the label of the tab that they are for ("" is the strip)."""

    def __init__(self, page: Any):
        config = page.request.get(page.url.split("#")[0] + "config").json()
        clocks = {
            each["id"]: each["targets"][0][0]
            for each in config["dependencies"]
            if each["targets"] and each["targets"][0][1] == "tick"
        }
        labels = {each["id"]: each["props"].get("label") for each in config["components"] if each["type"] == "tabitem"}
        above: dict[int, str] = {}

        def walk(node: dict[str, Any], tab: str) -> None:
            above[node["id"]] = tab
            for child in node.get("children") or []:
                walk(child, labels.get(node["id"]) or tab)

        walk(config["layout"], "")
        self.names = {function: above[clock] for function, clock in clocks.items()}
        self.heard: list[str] = []
        page.on("request", self._hear)

    def _hear(self, request: Any) -> None:
        if request.method == "POST" and request.url.endswith("/run/predict"):
            function = json.loads(request.post_data)["fn_index"]
            if function in self.names:
                self.heard.append(self.names[function])

    def during(self, page: Any, seconds: float) -> set[str]:
        self.heard.clear()
        page.wait_for_timeout(seconds * 1000)
        return set(self.heard)


def test_only_what_is_in_sight_asks_for_news(me):
    ears = Ears(me.page)
    assert set(ears.names.values()) >= {"", "Dataset", "Train", "Export", "History"}
    me.open("export")
    me.page.wait_for_timeout(1000)  # the tab before may still have one under way
    assert ears.during(me.page, 5) == {"", "Export"}
    ears.heard.clear()
    me.open("history")
    until(lambda: me.page.wait_for_timeout(50) or "History" in ears.heard, 2, "it waits for its turn")
    assert "Export" not in ears.during(me.page, 5)

    me.page.evaluate(HIDE, True)
    me.page.wait_for_timeout(1000)
    assert ears.during(me.page, 6) == set(), "nobody looks"
    me.page.evaluate(HIDE, False)
    until(lambda: me.page.wait_for_timeout(50) or set(ears.heard) == {"", "History"}, 2, "it is not looked at again")


def test_a_tab_that_is_opened_with_the_page_is_kept_true(me):
    """A reload, Gradio's own after a lost connection included, opens the tab of the address while the page is built."""
    for again in range(3):
        me.page.goto(me.page.url.split("#")[0] + "#export")
        me.page.reload()
        me.sees("of the recipe" if again else "There is no trained run yet")
        ears = Ears(me.page)
        assert "Export" in ears.during(me.page, 5)
        me.sees(exported(me.home).id.rpartition("-")[2], 10)


def test_an_answer_that_never_comes_does_not_stop_the_clock(me):
    me.open("export")
    ears = Ears(me.page)
    held: list[Any] = []

    def lose(route: Any) -> None:
        """The next tick of the export tab is never answered."""
        if not held and ears.names.get(json.loads(route.request.post_data)["fn_index"]) == "Export":
            held.append(route)
        else:
            route.continue_()

    me.page.evaluate("AbortSignal.timeout = ((was) => () => was(2000))(AbortSignal.timeout)")
    me.page.route("**/run/predict", lose)
    until(lambda: me.page.wait_for_timeout(100) or held, 10, "the tab asked nothing")
    began = time.monotonic()
    ears.heard.clear()
    until(lambda: me.page.wait_for_timeout(100) or "Export" in ears.heard, 20, "the clock stands")
    assert time.monotonic() - began > 1.5
