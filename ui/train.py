"""The train tab: start, watch, stop, resume."""

import gradio as gr

from ui.panel import Live, Panel

TITLE = "Train"


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text])
