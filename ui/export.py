"""The export tab: quants, their acceptance, download."""

import gradio as gr

from ui.panel import Live, Panel

TITLE = "Export"


def build(panel: Panel) -> Live:
    text = gr.HTML("")
    return Live(lambda: gr.skip(), [text])
