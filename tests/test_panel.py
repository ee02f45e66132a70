"""The operator's whole way in a real browser, on the small base: from dropping files to a finished export. Pictures of
what was on the screen stay in KATHERINE_SCREENSHOTS, by default screenshots/ in the project."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import queue
from katherine import drafts, probes, runs, settings
from katherine.runs import State
from katherine.settings import PROJECT, Home

pytestmark = pytest.mark.browser

PICTURES = Path(os.environ.get("KATHERINE_SCREENSHOTS") or PROJECT / "screenshots")
WIDE, PHONE = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}


@pytest.fixture
def home(tmp_path) -> Home:
    """Nothing in it yet but what set-up fetched."""
    root = tmp_path / "home"
    root.mkdir()
    if (cache := settings.home().cache).is_dir():
        (root / "cache").symlink_to(cache.resolve())
    return Home(root)


class Operator:
    """A browser at the operator's page, and what its console complained of."""

    def __init__(self, browser: Any, served: Any, **context: Any):
        self._context = browser.new_context(**{"viewport": WIDE, "accept_downloads": True} | context)
        self.page = self._context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))
        served.log_in(self.page)
        self.page.wait_for_selector("#tabs [role=tab]")

    def open(self, tab: str) -> None:
        self.page.wait_for_function("window.katherine !== undefined")
        self.page.evaluate("(name) => katherine.openTab(name)", tab)
        self.page.wait_for_function("(name) => location.hash === `#${name}`", arg=tab)

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(700)  # for a figure's or a tab's last frame: a picture, not a check
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name).locator("visible=true").first

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def at_the_panel(browser, serving, home) -> Iterator[Any]:
    """at_the_panel(): another operator at the same panel; .served is the panel."""
    opened: list[Operator] = []

    def sit_down(**context: Any) -> Operator:
        opened.append(Operator(browser, sit_down.served, **context))
        return opened[-1]

    sit_down.served = serving(home)
    yield sit_down
    for operator in opened:
        operator.close()


def until(truth: Any, patience: float, what: str) -> Any:
    deadline = time.monotonic() + patience
    while not (found := truth()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_an_operator_takes_files_to_a_finished_export_while_the_panel_is_killed(at_the_panel, home):
    me = at_the_panel()
    page = me.page

    # The files, dropped all at once.
    me.picture("dataset-empty")
    files = sorted(probes.SAMPLE.glob("*.jsonl"))
    page.locator("input[type=file]").first.set_input_files(files)
    for file in files:
        page.get_by_text(file.name).first.wait_for()
    me.picture("dataset-inbox")
    page.get_by_label("Name", exact=True).fill("walk")
    page.get_by_label("Count tokens as this base does").fill("smollm2-135m")
    me.button("Prepare").click()
    page.locator("tr.k-row", has_text="walk-").first.wait_for(timeout=60_000)
    page.get_by_text("117").first.wait_for()
    me.picture("dataset-prepared")
    me.button("Use this dataset").click()
    dataset = until(lambda: drafts.load(home).dataset, 10, "the dataset was not taken over")
    assert dataset.startswith("walk-")

    # One epoch instead of three, typed into the form.
    me.open("recipe")
    page.get_by_label("Preset").first.wait_for()
    epochs = page.get_by_label("Epochs (passes)")
    epochs.first.fill("1")
    epochs.first.press("Tab")
    until(lambda: drafts.load(home).values["sft"]["num_train_epochs"] == 1, 10, "the form's change was not kept")
    page.get_by_text("30 optimiser steps").first.wait_for()
    me.picture("recipe")

    # The whole pipeline, by a double click.
    me.open("train")
    me.button("Queue the whole pipeline").dblclick()
    until(lambda: len(runs.everyone(home)) >= 4, 20, "no runs were queued")
    sft, dpo, export, probe = queued = runs.everyone(home)
    assert [run.record.kind for run in queued] == ["sft", "dpo", "export", "probe"]
    until(lambda: sft.status().step >= 3, 180, "the training did not begin")
    page.get_by_text(sft.id).first.wait_for()
    page.locator(".k-plot .main-svg").first.wait_for()
    me.picture("train-running")

    # The panel dies; the browser too; the run does not. A new one shows it.
    supervisor = sft.status().supervisor
    me.close()
    at_the_panel.served.kill()
    step = sft.status().step
    until(lambda: sft.status().step > step, 60, "the run stopped with the panel")
    at_the_panel.served.start()
    me = at_the_panel()
    me.open("train")
    page = me.page
    page.get_by_text(sft.id).first.wait_for(timeout=10_000)
    assert sft.status().supervisor == supervisor
    assert len(runs.everyone(home)) == 4, "a second run was started"

    phone = at_the_panel(viewport=PHONE, color_scheme="dark")
    phone.open("train")
    phone.page.get_by_text(sft.id).first.wait_for()
    phone.picture("train-phone-dark")

    until(lambda: dpo.status().step >= 3, 300, f"DPO did not begin: {sft.status()}")
    me.page.get_by_text(dpo.id).first.wait_for(timeout=15_000)
    me.picture("train-dpo")
    for run in (sft, dpo, export):
        assert queue.wait(home, run.id, timeout=400).state is State.succeeded, run.status()

    # What came of it, and one file taken home.
    me.open("export")
    page.get_by_text("3 of 3 files accepted").first.wait_for(timeout=15_000)
    me.picture("export")
    manifest = json.loads((export.out / "gguf" / "manifest.json").read_bytes())
    entry = manifest["files"][0]
    with page.expect_download(timeout=60_000) as downloading:
        page.get_by_role("link", name=entry["file"]).first.click()
    path = downloading.value.path()
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    phone.open("export")
    phone.page.get_by_text("3 of 3 files accepted").first.wait_for(timeout=15_000)
    phone.picture("export-phone-dark")

    queue.stop(home, probe.id, kill=True)
    queue.wait(home, probe.id, timeout=60)
    me.open("history")
    page.locator("tr.k-row", has_text=sft.id[-10:]).first.click()
    page.get_by_text("learning rate").first.wait_for()
    me.picture("history")
    assert me.complaints == []
