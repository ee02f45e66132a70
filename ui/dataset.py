"""The dataset tab: files in, what is in them, which go in."""

import gradio as gr

from ui.panel import Live, Panel

TITLE = "Dataset"


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text])
