"""The dataset tab through Gradio's own machinery, on real files and real errands: a visitor presses what a person would
press, and keeps what a page keeps."""

import asyncio
import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from gradio.state_holder import SessionState
from starlette.testclient import TestClient
from visitor import as_drawn

from jobs import errands
from katherine import bases, corpus, drafts, runs, shelf
from katherine.runs import ENDED, State
from katherine.settings import Home
from ui import dataset, files
from ui.panel import Panel

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 30.0
EVIL = "<img src=x onerror=alert(1)>"


def sft(asked: str, said: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def pair(asked: str, chosen: str, rejected: str, **tags: str) -> dict:
    replies = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in replies.items()}
    return {"prompt": [{"role": "user", "content": asked}]} | turns | tags


def write(path: Path, *rows: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path, katherine_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    made.root.mkdir()
    if katherine_home.cache.exists():
        made.cache.symlink_to(katherine_home.cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    yield made
    for errand in errands.under_way(made):
        errands.stop(made, errand.id)
        errands.wait(made, errand.id, PATIENCE)


class Visitor:
    """One open page: what each component shows, and what may be pressed. `memory` is the browser's own."""

    def __init__(self, home: Home, memory: dict[str, Any] | None = None):
        self.home = home
        with gr.Blocks() as self.page:
            self.live = dataset.build(Panel.of(home))
            self.page.load(self.live.refresh, list(self.live.inputs), list(self.live.outputs))
        self.tab = self.live.refresh.__self__
        self.inbox, self.contents = self.tab.inbox, self.tab.contents
        self.session = SessionState(self.page)
        self.shows: dict[int, dict[str, Any]] = {}
        for block in self.page.blocks.values():
            config = block.get_config()
            self.shows[block._id] = {name: config.get(name) for name in ("value", "choices", "interactive", "visible")}
        self.set(self.tab.memory, memory or {})
        self.refresh()

    def refresh(self, asked: list[Any] | None = None) -> int:
        """As the page's timer does, or with what it `asked` earlier. How many components were sent something."""
        return self._fire(next(fn for fn in self.page.fns.values() if fn.fn == self.live.refresh), given=asked)

    def asked(self) -> list[Any]:
        """What the timer would send now."""
        return [self.shows[block._id]["value"] for block in self.live.inputs]

    def press(self, component: Any, event: str = "click", data: Any = None) -> int:
        (function,) = [fn for fn in self.page.fns.values() if (component._id, event) in fn.targets and fn.fn]
        return self._fire(function, data)

    def value(self, component: Any) -> Any:
        return as_drawn(component, self.shows[component._id]["value"])

    def set(self, component: Any, value: Any) -> None:
        self.shows[component._id]["value"] = value

    def choices(self, component: Any) -> list[str]:
        return [label for label, _ in self.shows[component._id]["choices"]]

    def rows(self, table: Any) -> list[list[Any]]:
        return [[cell["t"] if isinstance(cell, dict) else cell for cell in row] for row in self.value(table)["rows"]]

    def visible(self, component: Any) -> bool:
        return self.shows[component._id]["visible"] is not False

    def everything(self) -> str:
        """All HTML that the page shows."""
        html = [b for b in self.page.blocks.values() if type(b) is gr.HTML and b._id in self.shows]
        return "\n".join(str(self.value(b)) for b in html if isinstance(self.value(b), str))

    def wait_for_dataset(self) -> str:
        until(lambda: self.refresh() is not None and not self.value(self.tab.memory).get("waiting"))
        return self.value(self.tab.memory)["dataset"]

    def _fire(self, function: Any, data: Any = None, given: list[Any] | None = None) -> int:
        given = given or [self.shows[block._id]["value"] for block in function.inputs]
        event = gr.EventData(None, data) if data is not None else None
        answer = asyncio.run(self.page.process_api(function, given, self.session, event_data=event))
        sent = 0
        for block, new in zip(function.outputs, answer["data"], strict=True):
            if isinstance(new, dict) and new.get("__type__") == "update":
                changes = {key: value for key, value in new.items() if key not in ("__type__", "props")}
            else:
                changes = {"value": new}
            sent += bool(changes)
            self.shows[block._id] |= changes
        return sent


def uploaded(home: Home, *paths: Path) -> list[dict[str, Any]]:
    """As Gradio hands on what came in: it lies in its own folder."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    folder.mkdir(exist_ok=True)
    moved = [path.rename(folder / path.name) for path in paths]
    return [{"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}} for path in moved]


def test_an_empty_home_says_what_to_do_next(home):
    visitor = Visitor(home)
    assert "The inbox is empty" in visitor.value(visitor.inbox.nothing)
    assert visitor.value(visitor.tab.table)["rows"] == []
    assert "Bring files in above" in visitor.value(visitor.tab.table)["empty"]
    assert not visitor.visible(visitor.contents.whole)
    assert visitor.refresh() == 0


def test_dropped_files_are_in_the_inbox_at_once_and_what_is_not_jsonl_is_refused(home, tmp_path):
    visitor = Visitor(home)
    good, bad = write(tmp_path / "talk.jsonl", sft("a", "b")), write(tmp_path / "talk.json", "[]")
    visitor.set(visitor.inbox.drop, uploaded(home, good, bad))
    visitor.press(visitor.inbox.drop, "upload")
    (kept,) = home.inbox.glob("uploads-*/*")
    assert kept.name == "talk.jsonl" and visitor.value(visitor.inbox.drop) is None
    assert visitor.value(visitor.inbox.choice) == [kept.relative_to(home.inbox).as_posix()]
    assert "talk.json was not taken: put one object a line" in visitor.value(visitor.inbox.refused)
    assert not list((tmp_path / "gradio").rglob("*.json*"))
    # A reload loses nothing.
    again = Visitor(home)
    assert len(again.choices(again.inbox.choice)) == 1


def test_chosen_files_become_a_dataset_that_is_then_shown(home):
    write(home.inbox / "a.jsonl", *(sft(f"q{n}", "a") for n in range(5)), pair("p", "x", "y"))
    write(home.inbox / "b.jsonl", sft("other", "one"), "{broken")
    visitor = Visitor(home)
    assert visitor.value(visitor.inbox.choice) == ["a.jsonl", "b.jsonl"]
    visitor.set(visitor.inbox.choice, ["a.jsonl"])
    visitor.set(visitor.inbox.name, "k0")
    visitor.set(visitor.inbox.base, bases.SMALL)
    visitor.set(visitor.inbox.uncurated, True)
    visitor.press(visitor.inbox.prepare)
    assert "prepare k0" in visitor.value(visitor.inbox.errands)
    dataset_id = visitor.wait_for_dataset()
    report = corpus.load(home, dataset_id).report
    assert dataset_id.startswith("k0-")
    assert (report["sft"]["unique"], report["dpo"]["used"], report["tokens"]["base"]) == (5, 1, bases.SMALL)
    visitor.refresh()
    assert visitor.rows(visitor.tab.table)[0][:4] == [dataset_id, 5, 1, 1]
    assert dataset_id in visitor.value(visitor.contents.title) and visitor.visible(visitor.contents.whole)
    assert "succeeded" in visitor.value(visitor.inbox.errands)
    until(lambda: visitor.refresh() == 0)


def test_pressing_prepare_twice_starts_once_and_nothing_chosen_starts_nothing(home):
    write(home.inbox / "a.jsonl", *(sft(f"q{n}", "a " * 50) for n in range(20_000)))
    visitor = Visitor(home)
    visitor.set(visitor.inbox.base, bases.SMALL)
    visitor.press(visitor.inbox.prepare)
    visitor.press(visitor.inbox.prepare)
    assert len(errands.everyone(home)) == 1
    visitor.press(visitor.inbox.stop)
    until(lambda: errands.under_way(home) == [])
    visitor.set(visitor.inbox.choice, [])
    with pytest.raises(gr.Error, match="No file is chosen"):
        visitor.press(visitor.inbox.prepare)
    assert len(errands.everyone(home)) == 1


def test_a_failed_preparation_names_the_file_and_loses_nothing(home):
    write(home.inbox / "broken.jsonl", "{broken", "[")
    visitor = Visitor(home)
    visitor.set(visitor.inbox.base, bases.SMALL)
    visitor.press(visitor.inbox.prepare)
    until(lambda: visitor.refresh() is not None and "failed" in visitor.value(visitor.inbox.errands))
    assert "broken.jsonl" in visitor.value(visitor.inbox.errands)
    assert (home.inbox / "broken.jsonl").exists()


def test_a_choice_of_files_survives_the_arrival_of_others(home):
    write(home.inbox / "a.jsonl", sft("a", "b"))
    write(home.inbox / "b.jsonl", sft("a", "c"))
    visitor = Visitor(home)
    visitor.set(visitor.inbox.choice, ["b.jsonl"])
    write(home.inbox / "more" / "c.jsonl", sft("a", "d"))
    visitor.refresh()
    assert visitor.value(visitor.inbox.choice) == ["b.jsonl"]
    assert len(visitor.choices(visitor.inbox.choice)) == 3


def test_an_upload_and_a_refresh_at_once_leave_the_new_files_ticked_and_the_refusal_said(home, tmp_path):
    """The timer's answer, asked for before the upload was done, comes after the upload's."""
    write(home.inbox / "old.jsonl", sft("a", "b"))
    visitor = Visitor(home)
    asked = visitor.asked()
    new, bad = write(tmp_path / "new.jsonl", sft("c", "d")), write(tmp_path / "new.json", "[]")
    visitor.set(visitor.inbox.drop, uploaded(home, new, bad))
    visitor.press(visitor.inbox.drop, "upload")
    ticked = visitor.value(visitor.inbox.choice)
    assert len(ticked) == 2
    visitor.refresh(asked)
    assert len(visitor.choices(visitor.inbox.choice)) == 2
    assert visitor.value(visitor.inbox.choice) == ticked
    assert "was not taken" in visitor.value(visitor.inbox.refused)


def test_deleting_from_the_inbox_asks_first(home):
    write(home.inbox / "up" / "a.jsonl", sft("a", "b"))
    visitor = Visitor(home)
    visitor.press(visitor.inbox.delete)
    assert visitor.visible(visitor.inbox.sure) and (home.inbox / "up" / "a.jsonl").exists()
    visitor.press(visitor.inbox.keep)
    assert not visitor.visible(visitor.inbox.sure)
    visitor.press(visitor.inbox.delete)
    visitor.press(visitor.inbox.sure)
    assert not list(home.inbox.iterdir()) and "The inbox is empty" in visitor.value(visitor.inbox.nothing)


def test_a_place_that_is_none_on_the_hub_is_refused_before_an_errand_is_begun(home):
    visitor = Visitor(home)
    visitor.set(visitor.inbox.path, "not a place")
    with pytest.raises(gr.Error, match="is no place on the hub"):
        visitor.press(visitor.inbox.fetch)
    assert errands.everyone(home) == []


# ---------------------------------------------------------------------------------------------- one dataset


@pytest.fixture
def made(home: Home, tmp_path: Path) -> corpus.Dataset:
    from katherine.template import ChatTemplate

    rows = [sft(f"question {n}", "an answer " * (n % 30 + 1)) for n in range(60)]
    others = [pair(f"why {n}", "because", "no", **({"_cat": "c", "_type": "t"} if n < 4 else {})) for n in range(9)]
    one = write(tmp_path / "in" / "one.jsonl", *rows, "{broken", *(sft(f"e{n}", "") for n in range(250)))
    two = write(tmp_path / "in" / "two.jsonl", *others, sft(EVIL, f"the Needle {EVIL}"), json.dumps({EVIL: 1}))
    template = ChatTemplate.load(bases.tokenizer(home, bases.SMALL))
    return corpus.prepare([one, two], home, template=template, base=bases.SMALL, max_length=64, name="talk")


def test_counts_are_by_kind_by_file_and_in_all(made, home):
    visitor = Visitor(home)
    kinds = {row[0]: row[1:] for row in visitor.rows(visitor.contents.kinds)}
    assert kinds["Conversations (SFT)"] == [61, 61, 0, "250", 0]
    assert kinds["Pairs (DPO)"] == [4, 9, 0, 0, 5]
    assert kinds["of them uncurated"] == [0, 5, "", "", 5]
    assert kinds["In all: 2 files, 322 lines"] == [65, 70, 0, "252", 5]
    assert visitor.rows(visitor.contents.by_file)[1] == ["two.jsonl", 11, 1, 9, 0, "1", ""]


def test_a_group_of_problems_opens_to_lines_page_by_page(made, home):
    visitor = Visitor(home)
    groups = [row[0] for row in visitor.rows(visitor.contents.groups)]
    assert groups[0] == "empty turn"
    visitor.press(visitor.contents.groups, "select", {"id": "0"})
    rows = visitor.rows(visitor.contents.problems)
    assert len(rows) == 100 and rows[0][:3] == ["one.jsonl", 62, "empty turn: turn 2 (assistant) has no text"]
    assert json.loads(rows[0][3]) == sft("e0", "")
    visitor.press(visitor.contents.more)
    visitor.press(visitor.contents.more)
    assert [row[1] for row in visitor.rows(visitor.contents.problems)][-1] == 311
    assert not visitor.visible(visitor.contents.more)
    for name in ("problems.csv", "problems.jsonl", "rejects.jsonl"):
        assert f"href='{files.dataset_address(made.id, name)}'" in visitor.value(visitor.contents.links)


def test_the_histogram_has_max_length_and_percentiles_drawn_in(made, home):
    visitor = Visitor(home)
    figure = visitor.value(visitor.contents.sft_lengths)
    assert sum(figure["data"][0]["y"]) == 61
    texts = [note["text"] for note in figure["layout"]["annotations"]]
    assert texts == ["p50", "p90", "p99", "max length 64"]
    tokens = shelf.summary(home, made.id).report["tokens"]
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [tokens["p50"], tokens["p90"], tokens["p99"], 64]
    over = tokens["over_max_length"]
    assert over and f"{over} longer, which training leaves out" in visitor.value(visitor.contents.sft_words)
    assert "The chosen reply is the longer one in 100% of 4 pairs" in visitor.value(visitor.contents.bias)


def test_examples_are_paged_searched_and_shown_with_the_learned_part_marked(made, home):
    visitor = Visitor(home)
    examples = visitor.contents.examples
    until(lambda: visitor.refresh() is not None and not visitor.value(examples.place).get("pending"))
    first = visitor.value(examples.cards)
    assert first.count("<article") == 5 and "1 to 5 of 61" in visitor.value(examples.where)
    visitor.press(examples.next)
    assert "6 to 10 of 61" in visitor.value(examples.where)
    visitor.press(examples.previous)
    assert visitor.value(examples.cards) == first
    visitor.set(examples.search, "NEEDLE")
    visitor.press(examples.search, "submit")
    card = visitor.value(examples.cards)
    assert card.count("<article") == 1
    assert "<mark class='kd-learned'>the Needle &lt;img src=x onerror=alert(1)&gt;</mark>" in card
    assert "<mark class='kd-learned kd-control'>&lt;|im_end|&gt;</mark>" in card
    visitor.set(examples.kind, "Pairs")
    visitor.set(examples.search, "why 2")
    visitor.press(examples.kind, "change")
    assert "<b>chosen</b>" in visitor.value(examples.cards) and "c · t" in visitor.value(examples.cards)


def test_what_goes_in_is_changed_into_another_dataset(made, home):
    visitor = Visitor(home)
    contents = visitor.contents
    assert visitor.value(contents.files) == ["one.jsonl", "two.jsonl"]
    assert (visitor.value(contents.uncurated), len(visitor.choices(contents.pairs))) == ("none", 5)
    two = [pair for pair in shelf.uncurated(home, made.id, 9) if pair.prompt in ("why 5", "why 7")]
    visitor.set(contents.files, ["two.jsonl"])
    visitor.set(contents.uncurated, "chosen below")
    visitor.set(contents.pairs, [pair.id for pair in two])
    visitor.set(contents.name, "less")
    visitor.press(contents.change)
    dataset_id = visitor.wait_for_dataset()
    report = corpus.load(home, dataset_id).report
    assert (report["sft"]["unique"], report["dpo"]["used"], report["options"]["max_length"]) == (1, 6, 64)
    assert dataset_id.startswith("less-") and (home.datasets / made.id).exists()
    visitor.refresh()
    assert visitor.value(contents.files) == ["two.jsonl"] and len(visitor.value(contents.pairs)) == 2


def test_two_datasets_are_compared_in_the_background_and_once(made, home, tmp_path):
    other = corpus.prepare([write(tmp_path / "c.jsonl", sft("question 0", "an answer"), sft("new", "one"))], home)
    visitor = Visitor(home, {"dataset": made.id})
    assert visitor.choices(visitor.contents.other) == [other.id]
    visitor.set(visitor.contents.other, other.id)
    visitor.press(visitor.contents.other, "input")
    until(lambda: visitor.refresh() is not None and visitor.value(visitor.contents.comparing) == "")
    assert visitor.rows(visitor.contents.compared) == [["Conversations", 60, 1, 1], ["Pairs", 4, 0, 0]]
    assert "max_length: 64 here, 1,024 there" in visitor.value(visitor.contents.differs)
    visitor.press(visitor.contents.other, "input")
    assert len(errands.everyone(home)) == 1
    assert visitor.rows(visitor.contents.compared)[0] == ["Conversations", 60, 1, 1]


def test_a_dataset_is_used_for_the_next_run(made, home):
    visitor = Visitor(home)
    visitor.press(visitor.contents.use)
    assert drafts.load(home).dataset == made.id
    assert "used for the next run" in visitor.value(visitor.contents.title)


def test_deleting_a_dataset_takes_two_steps_and_never_one_that_a_run_used(made, home):
    visitor = Visitor(home)
    visitor.press(visitor.contents.delete)
    assert visitor.visible(visitor.contents.sure) and (home.datasets / made.id).exists()
    visitor.press(visitor.contents.keep)
    run = runs.create(home, "sft", recipe={}, who="test", dataset=made.id)
    with pytest.raises(gr.Error, match=run.id):
        visitor.press(visitor.contents.delete)
    with pytest.raises(gr.Error, match="so it stays"):
        visitor.press(visitor.contents.sure)
    run.path.rename(home.root / "elsewhere")
    visitor.press(visitor.contents.delete)
    visitor.press(visitor.contents.sure)
    assert not (home.datasets / made.id).exists()
    assert visitor.value(visitor.tab.table)["rows"] == [] and not visitor.visible(visitor.contents.whole)


def test_the_chosen_dataset_survives_a_reload_and_the_newest_is_shown_otherwise(made, home, tmp_path):
    corpus.prepare([write(tmp_path / "c.jsonl", sft("x", "y"))], home, name="newer")
    visitor = Visitor(home)
    assert "newer-" in visitor.value(visitor.contents.title)
    visitor.press(visitor.tab.table, "select", {"id": made.id})
    again = Visitor(home, visitor.value(visitor.tab.memory))
    assert made.id in again.value(again.contents.title)
    gone = Visitor(home, {"dataset": "gone-12345678"})
    assert "newer-" in gone.value(gone.contents.title)


def test_nothing_of_datas_becomes_html(home):
    name = EVIL.replace("/", "")
    write(
        home.inbox / f"{name}.jsonl",
        sft(EVIL, EVIL),
        pair(EVIL, "x", "y", _cat=EVIL, _type=EVIL),
        json.dumps({EVIL: 1}),
    )
    write(home.inbox / f"{name}.json", "[]")
    visitor = Visitor(home)
    visitor.set(visitor.inbox.base, EVIL)
    visitor.press(visitor.inbox.prepare)
    until(lambda: visitor.refresh() is not None and errands.under_way(home) == [])
    visitor.set(visitor.inbox.base, bases.SMALL)
    visitor.press(visitor.inbox.prepare)
    visitor.wait_for_dataset()
    visitor.press(visitor.contents.groups, "select", {"id": "0"})
    for kind in ("Conversations", "Pairs"):
        visitor.set(visitor.contents.examples.kind, kind)
        visitor.press(visitor.contents.examples.kind, "change")
        assert "&lt;img" in visitor.value(visitor.contents.examples.cards)
    shown = visitor.everything()
    assert "<img" not in shown and shown.count("&lt;img") > 3
    visitor.set(visitor.inbox.path, EVIL)
    with pytest.raises(gr.Error) as refused:
        visitor.press(visitor.inbox.fetch)
    assert "<img" not in str(refused.value)


def test_old_datasets_show_without_what_they_lack(made, home):
    for name in ("summary.json", "problems.jsonl", "uncurated.jsonl"):
        (made.path / name).unlink()
    report = json.loads((made.path / "report.json").read_bytes())
    del report["histograms"], report["options"]["left_out"]
    (made.path / "report.json").write_text(json.dumps(report))
    visitor = Visitor(home)
    assert visitor.rows(visitor.contents.groups)[0][0] == "empty turn"
    visitor.press(visitor.contents.groups, "select", {"id": "0"})
    assert len(visitor.rows(visitor.contents.problems)) == 100
    assert visitor.value(visitor.contents.sft_lengths) is None
    assert "take all or none" in visitor.value(visitor.contents.pairs_note)


def test_a_page_that_stays_open_over_a_restart_of_the_panel_goes_on(made, home):
    """The new process remembers nothing of what the page was offered."""
    write(home.inbox / "late.jsonl", sft("x", "y"))
    before = Visitor(home)
    after = Visitor(home)
    after.session = SessionState(after.page)
    for mine, theirs in zip(after.page.blocks.values(), before.page.blocks.values(), strict=True):
        after.shows[mine._id] = before.shows[theirs._id]
    after.set(after.inbox.choice, ["late.jsonl"])
    after.set(after.inbox.base, bases.SMALL)
    after.press(after.inbox.prepare)
    assert errands.everyone(home)[0].request["paths"] == [str(home.inbox / "late.jsonl")]
    assert after.press(after.contents.examples.next)
    assert "6 to 10" in after.value(after.contents.examples.where)


def test_what_an_errand_of_another_page_makes_is_listed_here(home):
    write(home.inbox / "a.jsonl", sft("x", "y"))
    here, there = Visitor(home), Visitor(home)
    there.set(there.inbox.base, bases.SMALL)
    there.press(there.inbox.prepare)
    errand = errands.everyone(home)[0]
    until(lambda: errand.status().state in ENDED)
    assert errand.status().state is State.succeeded
    here.refresh()
    assert len(here.value(here.tab.table)["rows"]) == 1


def test_problems_and_rejected_lines_are_downloaded_by_plain_links(made, home):
    app = FastAPI()
    files.add_routes(app, home)
    client = TestClient(app)
    table = client.get(files.dataset_address(made.id, "problems.csv"))
    assert table.status_code == 200 and "attachment" in table.headers["content-disposition"]
    rows = list(csv.reader(io.StringIO(table.text)))
    assert len(rows) - 1 == len(made.report["problems"])
    lines = client.get(files.dataset_address(made.id, "rejects.jsonl")).text.splitlines()
    assert len(lines) == 252 and json.loads(json.loads(lines[-1])["text"]) == {EVIL: 1}
    for wrong in ("summary.json", "raw", "../report.json", "nothing"):
        assert client.get(files.dataset_address(made.id, wrong)).status_code == 404
    assert client.get(files.dataset_address("absent-12345678", "problems.csv")).status_code == 404
