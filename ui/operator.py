"""The operator's page: the status strip above the tabs, in the order of the work. Each tab is a module with TITLE and
build(panel); what they share is wired here, and nothing else is."""

from types import ModuleType

import gradio as gr

from ui import chat, dataset, export, history, probes, publish, recipe, startup, strip, train, verdicts
from ui.clock import clock
from ui.edge import shown
from ui.panel import Live, Panel

TABS: tuple[ModuleType, ...] = (dataset, recipe, train, export, chat, probes, verdicts, publish, history)

_TOP = (
    '<header><b>Katherine</b><nav><a href="/review/">Reviewer\'s page</a><a href="/logout">Log out</a></nav></header>'
)


def build(panel: Panel) -> gr.Blocks:
    with startup.page("Katherine") as page:
        gr.HTML(_TOP, elem_classes="k-top", apply_default_css=False)
        _keep(strip.build(panel))
        with gr.Tabs(elem_id="tabs"):
            for module in TABS:
                with gr.Tab(module.TITLE, id=module.TITLE.lower()):
                    _keep(module.build(panel))
    return page


def _keep(live: Live) -> None:
    """The tab stays true while it is open: only what is in sight asks for news."""
    clock(live.every).tick(
        shown(live.refresh),
        inputs=list(live.inputs),
        outputs=list(live.outputs),
        show_progress="hidden",
        # A person's own events are queued, since Gradio shows an error of those alone. A refresh needs no message: it
        # comes again, and half the requests are saved.
        queue=False,
        api_visibility="private",
    )
