"""gr.HTML to derive components from. Gradio writes a .pyi file beside the source of every derived class, at import: not
wanted in a checkout, nor possible in one that cannot be written to."""

import json
from typing import Any

import gradio as gr
from gradio import component_meta


def _no_stub(*_: Any) -> None:
    pass


component_meta.create_or_modify_pyi = _no_stub  # type: ignore[assignment]

HTML = gr.HTML


def when_ready(call: str, script: str = "katherine") -> str:
    """JavaScript for `js_on_load` that makes the call as soon as the script has come that sets window.<script> and then
    fires an event of that name, as static/katherine.js does: Gradio loads what is in a page's head beside its own
    scripts, in no certain order."""
    waited = f"new Promise((come) => addEventListener('{script}', come, {{ once: true }}))"
    return f"(window.{script} ? Promise.resolve() : {waited}).then(() => {{ {call}; }});"


class Data(HTML):
    """An HTML whose value is not a text but something that its script draws: whatever JSON can hold. It goes to the
    page as one text, which `katherine.data(props)` reads there: Gradio's page copies the values of most components at
    every event, part by part, and for a table of 500 rows that takes longer than opening a tab may."""

    def postprocess(self, value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))


class Choice(gr.Dropdown):
    """A drop-down whose value the handler looks up itself. Gradio's own refuses what it does not remember having
    offered: a choice made before the server was started again, or before the list moved on, would be an error at
    every refresh."""

    is_template = True  # drawn as gr.Dropdown is

    def preprocess(self, payload: Any) -> Any:
        return payload
