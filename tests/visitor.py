"""A tab as one visitor has it open: events go through Gradio's own machinery, and what comes back is kept as a browser
would keep it. No browser, no server."""

import asyncio
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import gradio as gr
from gradio.state_holder import SessionState
from starlette.requests import Request

from ui.component import Data
from ui.edge import shown
from ui.panel import Panel
from ui.passwords import Role
from ui.table import Table


class Visitor:
    """role: as the door would have it; None stands for no request at all."""

    def __init__(self, module: ModuleType, panel: Panel, role: Role | None = None):
        with gr.Blocks() as self.page:
            live = module.build(panel)
            # Stands for what the operator's page does when a tab is opened and every few seconds.
            self._clock = gr.Button("clock")
            self._clock.click(shown(live.refresh), list(live.inputs), list(live.outputs), queue=False)
        self._session = SessionState(self.page)
        self._request = _request(role) if role else None
        self.shows: dict[int, dict[str, Any]] = {
            key: {"value": getattr(block, "value", None), "visible": getattr(block, "visible", True)}
            for key, block in self.page.blocks.items()
        }

    def refresh(self) -> set[Any]:
        """What came, as the components that changed."""
        return self.fire(self._clock, "click")

    def fire(self, block: Any, event: str, **data: Any) -> set[Any]:
        """The event of a component, with its data; the components that changed by it. Raises gr.Error."""
        function = next(fn for fn in self.page.fns.values() if (block._id, event) in fn.targets)
        given = [self.shows[each._id]["value"] for each in function.inputs]
        heard = gr.EventData(None, data) if data else None
        answer = asyncio.run(
            self.page.process_api(function, given, self._session, request=self._request, event_data=heard)
        )
        changed = set()
        for component, value in zip(function.outputs, answer["data"], strict=True):
            if isinstance(component, gr.State):
                continue
            if isinstance(value, dict) and value.get("__type__") == "update":
                news = {name: each for name, each in value.items() if name not in ("__type__", "props")}
            else:
                news = {"value": value}
            if news:
                self.shows[component._id] |= news
                changed.add(component)
        return changed

    def choose(self, block: Any, value: Any, event: str = "change") -> set[Any]:
        """As if the visitor had picked or typed the value."""
        self.shows[block._id]["value"] = value
        return self.fire(block, event)

    def find(self, kind: type | None = None, *, label: str = "", style: str = "", column: str = "") -> Any:
        """The one component of this kind with that label, style class or column."""
        found = [
            block
            for block in self.page.blocks.values()
            if (kind is None or isinstance(block, kind))
            and (not label or getattr(block, "label", None) == label)
            and (not style or style in (getattr(block, "elem_classes", None) or []))
            and (not column or (isinstance(block, Table) and column in self.value(block)["columns"]))
        ]
        assert len(found) == 1, found
        return found[0]

    def value(self, block: Any) -> Any:
        return as_drawn(block, self.shows[block._id]["value"])

    def visible(self, block: Any) -> bool:
        """Whether the component and all that it lies in are shown."""
        while block is not None:
            if not self.shows.get(block._id, {}).get("visible", True):
                return False
            block = block.parent
        return True

    def rows(self, table: Any) -> list[list[str]]:
        """A table's cells as text."""
        return [[_text(cell) for cell in row] for row in self.value(table)["rows"]]

    def button(self, label: str) -> Any:
        """The visible button whose label begins so."""
        found = [
            block
            for key, block in self.page.blocks.items()
            if isinstance(block, gr.Button) and str(self.shows[key]["value"]).startswith(label) and self.visible(block)
        ]
        assert len(found) == 1, [str(self.shows[block._id]["value"]) for block in found]
        return found[0]

    def html(self) -> str:
        """Everything that goes into the page as HTML, tables and figures aside."""
        values = [
            self.shows[key]["value"]
            for key, block in self.page.blocks.items()
            if isinstance(block, gr.HTML) and not isinstance(block, Data)
        ]
        return "\n".join(value for value in values if isinstance(value, str))


def as_drawn(block: Any, value: Any) -> Any:
    """A component's value as the page's script reads it."""
    return json.loads(value) if isinstance(block, Data) else value


def _request(role: Role) -> gr.Request:
    visit = SimpleNamespace(session=SimpleNamespace(role=role))
    return gr.Request(Request({"type": "http", "headers": [], "katherine.visit": visit}))


def _text(cell: Any) -> str:
    return str(cell["t"] if isinstance(cell, dict) else cell)
