"""The dataset tab: files in (ui.inbox), the datasets made of them, and one of these in full (ui.contents)."""

from collections import Counter
from typing import Any

import gradio as gr

from jobs import errands
from katherine import drafts, shelf
from katherine.errors import KatherineError
from katherine.runs import ENDED, State
from katherine.shelf import Summary
from katherine.units import moment
from ui.contents import Contents
from ui.edge import shown
from ui.held import held
from ui.inbox import Inbox
from ui.panel import Live, Panel
from ui.table import Cell, Table
from ui.told import Told

TITLE = "Dataset"
# Seconds between two looks: what is prepared or fetched takes several.
EVERY = 2.0


def build(panel: Panel) -> Live:
    tab = _Tab(panel)
    return Live(tab.refresh, tab.outputs, [tab.memory, tab.seen, tab.inbox.choice, *tab.watched], EVERY)


class _Tab:
    """memory: what this browser remembers over a reload: `dataset`, the one that is shown, and `waiting`, the errand
    whose dataset is to be shown once it is there. seen: what this page shows by now, so that a refresh says only
    what has changed."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self.home = panel.home
        # The secret hides nothing (what is kept is an id); one that stays lets the next server read it too.
        self.memory = gr.BrowserState({}, storage_key="katherine-dataset", secret="katherine-dataset")
        self.seen = held({})
        self.inbox = Inbox(panel, self.seen, self.memory)
        self.table = Table(
            ["Dataset", "SFT#", "Pairs#", "Files#", "Problems#", "Made", "Runs#", ""],
            "No dataset yet. Bring files in above, choose those that go in, and prepare.",
            selects=True,
            elem_classes="kd-wide",
        )
        self.contents = Contents(panel, self.memory)
        self.watched = [self.contents.examples.place, self.contents.comparing]
        given: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.memory, self.seen, self.table, *self.contents.outputs]
        self.table.select(shown(self.choose), [self.memory, self.seen], outputs, **given)
        self.contents.sure.click(shown(self.remove), [self.memory, self.seen], outputs, **given)

    @property
    def outputs(self) -> list[Any]:
        return [self.memory, self.seen, self.table, *self.inbox.outputs, *self.contents.outputs]

    def refresh(
        self,
        memory: dict[str, Any] | None,
        seen: dict[str, Any] | None,
        chosen: list[str] | None,
        place: dict[str, Any] | None,
        comparing: str | None,
    ) -> Any:
        memory, told = dict(memory or {}), Told(seen)
        changed = self.inbox.refresh(told, chosen or [])
        changed |= self._arrived(memory)
        datasets = shelf.everyone(self.home)
        changed |= self._shown(memory, told, datasets)
        if self.contents.whole not in changed:
            changed |= self.contents.refresh(memory.get("dataset"), place or {}, comparing or "")
        changed |= self._listed(memory, told, datasets)
        return changed | {self.seen: told.marks} if changed else gr.skip()

    def choose(self, memory: dict[str, Any] | None, seen: dict[str, Any] | None, event: gr.EventData) -> dict[Any, Any]:
        memory, told = dict(memory or {}) | {"dataset": str(event.id)}, Told(seen)
        memory.pop("waiting", None)
        datasets = shelf.everyone(self.home)
        changed = self._shown(memory, told, datasets) | self._listed(memory, told, datasets)
        return changed | {self.memory: memory, self.seen: told.marks}

    def remove(self, memory: dict[str, Any] | None, seen: dict[str, Any] | None) -> dict[Any, Any]:
        memory, told = dict(memory or {}), Told(seen)
        if memory.get("dataset"):
            shelf.remove(self.home, memory.pop("dataset"))
        datasets = shelf.everyone(self.home)
        changed = self._shown(memory, told, datasets) | self._listed(memory, told, datasets)
        return changed | {self.memory: memory, self.seen: told.marks}

    def _arrived(self, memory: dict[str, Any]) -> dict[Any, Any]:
        """Shows the dataset that was waited for, once it is there."""
        if not memory.get("waiting"):
            return {}
        try:
            errand = errands.load(self.home, memory["waiting"])
            state = errand.status().state
            if state not in ENDED:
                return {}
            if state is State.succeeded:
                memory["dataset"] = errand.result()["dataset"]
        except KatherineError:
            pass  # gone or damaged: the list of errands says so
        memory.pop("waiting")
        return {self.memory: memory}

    def _shown(self, memory: dict[str, Any], told: Told, datasets: list[Summary]) -> dict[Any, Any]:
        """The dataset that is remembered, else the one for the next run, else the newest."""
        there = {one.id for one in datasets}
        wanted = [memory.get("dataset"), drafts.load(self.home).dataset, datasets[0].id if datasets else None]
        dataset_id = next((one for one in wanted if one in there), None)
        changed: dict[Any, Any] = {}
        if memory.get("dataset") != dataset_id:
            memory["dataset"] = dataset_id
            changed[self.memory] = memory
        if told.is_news("shown", dataset_id):
            changed |= self.contents.show(dataset_id)
        return changed

    def _listed(self, memory: dict[str, Any], told: Told, datasets: list[Summary]) -> dict[Any, Any]:
        runs = Counter(one.run.record.dataset for one in self.panel.history.runs())
        draft = drafts.load(self.home).dataset
        rows = []
        for one in datasets:
            report = one.report
            problems = sum(group["count"] for group in report["problem_groups"])
            rows.append(
                [one.id, report["sft"]["unique"], report["dpo"]["used"], report["files"], problems,
                 Cell(moment(one.created), sort=one.created), runs[one.id],
                 Cell("next run", tone="good") if one.id == draft else ""]
            )  # fmt: skip
        value = self.table.rows(rows, ids=[one.id for one in datasets], selected=memory.get("dataset"))
        if not told.is_news("table", value):
            return {}
        changed: dict[Any, Any] = {self.table: value}
        if memory.get("dataset") in {one.id for one in datasets}:
            changed |= self.contents.heading(shelf.summary(self.home, memory["dataset"]))
        return changed
