"""The history tab: all runs, one run, two runs compared."""

import gradio as gr

from ui.panel import Live, Panel

TITLE = "History"


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text])
