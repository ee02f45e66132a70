"""The operator's way in a real browser, on the small base: from dropping files to a finished export, through a killed
panel and a lost network. What comes after is test_handover's."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from people import PHONE, WHOLE_RUN, Person, until

from bench import past
from jobs import queue
from katherine import bases, corpus, drafts, probesets, runs, settings
from katherine.runs import State
from katherine.settings import Home
from katherine.template import ChatTemplate

pytestmark = pytest.mark.browser


@pytest.fixture
def home(tmp_path) -> Home:
    """Nothing in it yet but what set-up fetched."""
    root = tmp_path / "home"
    root.mkdir()
    if (cache := settings.home().cache).is_dir():
        (root / "cache").symlink_to(cache.resolve())
    return Home(root)


@pytest.fixture
def at_the_panel(browser, serving, home) -> Iterator[Any]:
    """at_the_panel(): another operator at the same panel; .served is the panel."""
    opened: list[Person] = []

    def sit_down(**context: Any) -> Person:
        opened.append(Person(browser, sit_down.served, **context))
        return opened[-1]

    sit_down.served = serving(home)
    yield sit_down
    for operator in opened:
        operator.close()


# Every way in which markup could come to life: as HTML, as a script, as a template of JavaScript's or Handlebars'.
EVIL = '<img src=x onerror="window.ran=1"><script>window.ran=2</script>${window.ran=3}{{value}}'


def fill_with_evil(home: Home) -> None:
    """A dataset, runs, logs, manifests and answers whose every free word is EVIL."""
    source = home.root / "inbox" / '<img src=x onerror="window.ran=4">.jsonl'
    source.parent.mkdir(parents=True, exist_ok=True)
    talk = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]}
    source.write_text(json.dumps(talk) + "\n" + json.dumps({EVIL: EVIL}) + "\n")
    template = ChatTemplate.load(bases.tokenizer(home, bases.SMALL))
    corpus.prepare([source], home, template=template, base=bases.SMALL, name="evil")

    def spoiled(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: spoiled(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [spoiled(each, name) for each in value]
        return EVIL if name in ("who", "finding", "reason", "base", "revision", "remedy", "file", "quant") else value

    for run in past.write_past(home, runs=8, steps=20, datasets=1):
        for path in (run.path / "run.json", run.path / "result.json", run.out / "gguf" / "manifest.json"):
            if path.is_file():
                runs.write_json(path, spoiled(json.loads(path.read_bytes())))
        run.log.write_text(EVIL + "\n")
        if run.record.kind == "sft":
            run.set_status(state=State.failed, reason=EVIL, remedy=EVIL)
        if run.record.kind == "probe":
            said = {"role": "assistant", "content": EVIL}
            score = {"passed": False, "reasons": [EVIL]}
            row = {"model": "q4_k_m", "probe": EVIL, "category": EVIL, "talk": [said | {"role": "user"}, said]}
            (run.out / "answers.jsonl").write_text(json.dumps(row | {"score": score}) + "\n")


def test_what_came_from_data_models_and_file_names_is_only_ever_text(at_the_panel, home):
    fill_with_evil(home)
    me = at_the_panel()
    seen: dict[str, str] = {}
    for tab in ("dataset", "recipe", "train", "export", "chat", "probes", "review", "publish", "history"):
        me.open(tab)
        me.page.wait_for_timeout(2500)  # what may come to life gets the time to
        if tab == "dataset":
            for part in ("Problems", "Examples"):
                me.page.get_by_role("tab", name=part).locator("visible=true").first.click()
                me.page.wait_for_timeout(2500)
        for number in range(min(3, me.page.locator("tr.k-row:visible").count())):
            me.page.locator("tr.k-row:visible").nth(number).click()
            me.page.wait_for_timeout(1200)
        seen[tab] = me.page.locator("#tabs").inner_text()
        assert me.page.evaluate("window.ran") is None, tab
    for tab in ("dataset", "train", "export", "history"):
        assert "<img src=x onerror=" in seen[tab], f"nothing of it was shown in {tab}, so nothing was tried"
    me.page.goto(f"{at_the_panel.served.address}/review/")
    # None of these exports is sound, so none can be reviewed; hostile answers are test_review_page's.
    me.page.get_by_role("heading", name="Nothing to review yet").wait_for()
    assert me.page.evaluate("window.ran") is None
    assert me.complaints == []


@pytest.mark.slow
def test_an_operator_takes_files_to_a_finished_export_while_the_panel_is_killed(at_the_panel, home):
    me = at_the_panel()
    page = me.page

    # The files, dropped all at once.
    me.picture("dataset-empty")
    files = sorted(probesets.SAMPLE.glob("*.jsonl"))
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

    # One epoch instead of three, typed into the form at once, be the preset drawn in it yet or not.
    me.open("recipe")
    page.get_by_label("Preset").first.wait_for()
    epochs = page.get_by_label("Epochs (passes)")
    epochs.first.fill("1")
    epochs.first.press("Tab")
    until(lambda: drafts.load(home).values["sft"]["num_train_epochs"] == 1, 10, "the form's change was not kept")
    page.get_by_text("30 optimiser steps").first.wait_for()
    differing = [each.about.name for each in drafts.differences(home, drafts.load(home))]
    assert differing == ["num_train_epochs"], "kept, and nobody typed it"
    me.picture("recipe")

    # The whole pipeline, by a double click.
    me.open("train")
    me.button("Queue the whole pipeline").dblclick()
    until(lambda: len(runs.everyone(home)) >= 4, 20, "no runs were queued")
    sft, dpo, export, probe = queued = runs.everyone(home)
    assert [run.record.kind for run in queued] == ["sft", "dpo", "export", "probe"]
    until(lambda: sft.status().step >= 3, 180, "the training did not begin")
    me.sees(sft.id)
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
    me.sees(sft.id, 10)
    assert sft.status().supervisor == supervisor
    assert len(runs.everyone(home)) == 4, "a second run was started"

    # The network is away for a minute; the page that is open then shows where the run is by now.
    page.context.set_offline(True)
    page.wait_for_timeout(60_000)
    page.context.set_offline(False)

    def shows_the_present() -> bool:
        strip = page.inner_text("#strip").lower()
        under_way = [run for run in queued if run.status().state is State.running]
        if not under_way or under_way[0].record.kind not in strip:
            return False
        status, step = under_way[0].status(), re.search(r"step (\d+) of", strip)
        # One that is still being loaded has made no step, which is the present as well.
        return abs(int(step[1]) - status.step) <= 2 if step and status.of else status.phase in strip

    until(shows_the_present, 20, "the open page stands still")

    phone = at_the_panel(viewport=PHONE, color_scheme="dark")
    phone.open("train")
    phone.sees(sft.id)
    phone.picture("train-phone-dark")

    until(lambda: dpo.status().step >= 3, WHOLE_RUN, f"DPO did not begin: {sft.status()}")
    me.sees(dpo.id)
    me.picture("train-dpo")
    for run in (sft, dpo, export):
        assert queue.wait(home, run.id, timeout=WHOLE_RUN).state is State.succeeded, run.status()

    # What came of it, and one file taken home.
    me.open("export")
    me.sees("of 3 files accepted")
    me.picture("export")
    manifest = json.loads((export.out / "gguf" / "manifest.json").read_bytes())
    entry = manifest["files"][0]
    with page.expect_download(timeout=60_000) as downloading:
        page.get_by_role("link", name=entry["file"]).first.click()
    path = downloading.value.path()
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    phone.open("export")
    phone.sees("of 3 files accepted")
    phone.picture("export-phone-dark")

    queue.stop(home, probe.id, kill=True)
    queue.wait(home, probe.id, timeout=60)
    me.open("history")
    page.locator("tr.k-row", has_text=sft.id[-10:]).first.click()
    me.sees("learning rate")
    me.picture("history")
    assert me.complaints == []
