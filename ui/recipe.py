"""The recipe tab: forms made from the recipe models, and what it will cost."""

import gradio as gr

from ui.panel import Live, Panel

TITLE = "Recipe"


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text])
