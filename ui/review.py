"""The reviewer's page. It has no operator's handler in it."""

import gradio as gr

from ui.panel import Panel


def build(panel: Panel) -> gr.Blocks:
    with gr.Blocks(title="Katherine: review", analytics_enabled=False) as page:
        gr.HTML("")
    return page
