"""The operator's page: the status strip above the tabs, in the order of the work. Each tab is a module with TITLE and
build(panel); what they share is wired here, and nothing else is."""

from types import ModuleType

import gradio as gr

from ui import chat, dataset, export, history, probes, publish, recipe, strip, train, verdicts
from ui.edge import shown
from ui.panel import Live, Panel

TABS: tuple[ModuleType, ...] = (dataset, recipe, train, export, chat, probes, verdicts, publish, history)

_TOP = '<b>Katherine</b><nav><a href="/review/">Reviewer\'s page</a><a href="/logout">Log out</a></nav>'


def build(panel: Panel) -> gr.Blocks:
    with gr.Blocks(title="Katherine", analytics_enabled=False) as page:
        gr.HTML(_TOP, elem_classes="k-top")
        above = strip.build(panel)
        every = gr.Timer(above.every or 2)
        _keep(every.tick, above)
        _keep(page.load, above)
        tabs: list[tuple[gr.Tab, Live]] = []
        with gr.Tabs(elem_id="tabs"):
            for module in TABS:
                with gr.Tab(module.TITLE, id=module.TITLE.lower()) as tab:
                    tabs.append((tab, module.build(panel)))
        # Outside of gr.Tabs, which counts whatever is in it as a tab.
        built = [(tab, live, gr.Timer(live.every or 60, active=False)) for tab, live in tabs]
        for index, (tab, live, timer) in enumerate(built):
            _keep(timer.tick, live)
            _keep(tab.select, live)
            # Only the open tab asks for news.
            tab.select(
                _only(index, [live.every is not None for _, live, _ in built]),
                outputs=[timer for *_, timer in built],
                show_progress="hidden",
                queue=False,
            )
        if built:
            _, first, timer = built[0]
            _keep(page.load, first)
            if first.every:
                page.load(lambda: gr.Timer(active=True), outputs=timer, show_progress="hidden", queue=False)
    # One slow handler of one visitor does not hold up the same handler of another.
    page.queue(default_concurrency_limit=8)
    return page


def _keep(event, live: Live) -> None:
    event(
        shown(live.refresh),
        inputs=list(live.inputs),
        outputs=list(live.outputs),
        show_progress="hidden",
        # A person's own events are queued, since Gradio shows an error of those alone. A refresh needs no message: it
        # comes again, and half the requests are saved.
        queue=False,
        api_visibility="private",
    )


def _only(index: int, lives: list[bool]):
    def activate() -> list[gr.Timer]:
        return [gr.Timer(active=live and place == index) for place, live in enumerate(lives)]

    return activate
