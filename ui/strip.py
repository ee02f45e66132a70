"""The status strip, on every tab: the GPU, the running job, disk, money."""

import gradio as gr

from ui.panel import Live, Panel


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text], every=2.0)
