"""The recipe tab in a real browser while answers overtake each other: the page's requests are held back and let go in
the order that hurts. What nobody typed is never kept, and what was typed is neither lost nor hidden."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from people import Person, until

from katherine import drafts
from katherine.settings import Home

pytestmark = pytest.mark.browser

REFRESHES, EDITS = "**/gradio_api/run/**", "**/gradio_api/queue/join*"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.root.mkdir()
    drafts.use_preset(found, "demo")
    return found


@pytest.fixture
def me(browser: Any, serving: Any, home: Home) -> Iterator[Person]:
    operator = Person(browser, serving(home))
    yield operator
    operator.close()


def hold(me: Person, which: str) -> Callable[[], None]:
    """From now on such requests wait, with what they carry, until the returned function is called."""
    waiting: list[Any] = []
    done = False
    me.page.route(which, lambda route: route.continue_() if done else waiting.append(route))

    def let_go() -> None:
        nonlocal done
        done = True
        for route in waiting:
            route.continue_()

    return let_go


def differing(home: Home) -> dict[str, Any]:
    """What differs from the preset, as stage.field: value."""
    return {f"{each.kind}.{each.about.name}": each.yours for each in drafts.differences(home, drafts.load(home))}


def field(me: Person, name: str) -> Any:
    return me.page.locator(f"#{name} input, #{name} textarea").first


def reads(me: Person, name: str, value: str) -> None:
    """Wait until the field shows the value."""
    until(lambda: field(me, name).input_value() == value, 15, f"{name} does not show {value}")


def kept(home: Home, name: str, value: Any) -> None:
    until(lambda: drafts.load(home).values["sft"][name] == value, 15, f"{name} was not kept")


def test_what_is_typed_before_the_form_is_drawn_is_all_that_is_kept(me, home):
    answer = hold(me, REFRESHES)
    me.open("recipe")
    field(me, "sft-num_train_epochs").fill("1")
    field(me, "sft-num_train_epochs").press("Tab")
    kept(home, "num_train_epochs", 1)
    assert differing(home) == {"sft.num_train_epochs": 1}
    answer()
    reads(me, "dpo-per_device_batch_size", "2")
    reads(me, "sft-per_device_batch_size", "2")
    reads(me, "sft-num_train_epochs", "1")
    assert me.complaints == []


def test_an_edit_that_is_answered_after_another_preset_was_drawn_keeps_nothing_of_the_former_one(me, home):
    drafts.use_preset(home, "k0")
    me.open("recipe")
    me.sees("No dataset is chosen")  # drawn
    keep = hold(me, EDITS)
    field(me, "sft-num_train_epochs").fill("1")
    drafts.use_preset(home, "demo")
    me.open("dataset")
    me.open("recipe")
    reads(me, "sft-per_device_batch_size", "2")
    keep()
    kept(home, "num_train_epochs", 1)
    assert differing(home) == {"sft.num_train_epochs": 1}
    # It was drawn before the edit was kept, and is drawn again.
    reads(me, "sft-num_train_epochs", "1")
    # The other fields of that drawing may come a moment later, and a person does not type within it.
    me.page.wait_for_timeout(1000)

    # Another page goes back. Of this one, which has not heard of it, the one field is kept that is typed in.
    answer = hold(me, REFRESHES)
    drafts.use_preset(home, "k0")
    field(me, "sft-learning_rate").fill("2e-4")
    field(me, "sft-learning_rate").press("Tab")
    kept(home, "learning_rate", 2e-4)
    assert differing(home) == {"sft.learning_rate": 2e-4}
    reads(me, "sft-per_device_batch_size", "16")
    reads(me, "sft-num_train_epochs", "3")
    reads(me, "sft-learning_rate", "2e-4")
    me.sees("This form was out of date")
    answer()
    assert me.complaints == []


def test_whenever_a_person_types_while_another_preset_comes_the_page_shows_what_is_kept_and_no_more_is(me, home):
    """A text that is typed in the very moment in which the form is drawn may be drawn over: then the page shows so."""
    me.open("recipe")
    me.sees("No dataset is chosen")
    for turn, pause in enumerate((0, 20, 60, 150, 400)):
        me.open("dataset")
        drafts.use_preset(home, ("k0", "demo")[turn % 2])
        me.open("recipe")
        me.page.wait_for_timeout(pause)
        typed, size = 10 + turn, ("16", "2")[turn % 2]
        field(me, "sft-num_train_epochs").fill(str(typed))
        field(me, "sft-num_train_epochs").press("Tab")
        reads(me, "sft-per_device_batch_size", size)

        def settled() -> bool:
            # Twice, since what is on its way may still change it.
            seen = [(field(me, "sft-num_train_epochs").input_value(), me.page.wait_for_timeout(500)) for _ in range(3)]
            kept = str(drafts.load(home).values["sft"]["num_train_epochs"])
            return {shown for shown, _ in seen} == {kept}

        until(settled, 15, f"the page shows other epochs than are kept, typed {pause} ms after the tab was opened")
        assert differing(home) in ({}, {"sft.num_train_epochs": typed}), f"typed {pause} ms after the tab was opened"
    field(me, "sft-num_train_epochs").fill("20")
    field(me, "sft-num_train_epochs").press("Tab")
    kept(home, "num_train_epochs", 20)
    assert differing(home) == {"sft.num_train_epochs": 20}
    assert me.complaints == []
