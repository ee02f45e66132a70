"""The least that Gradio can be asked for, as a baseline for the panel: as many tabs with a text field each, and a timer
that brings as many bytes a second as a refresh of the plots does. Served as the panel is, without anything of ours.
`python -m bench.bare PORT`"""

import sys

import gradio as gr
import uvicorn
from fastapi import FastAPI

TABS = 9
# A refresh's, as bench.panel sees them.
BYTES = 30_000


def page() -> gr.Blocks:
    ticks = iter(range(10**9))

    def refresh() -> str:
        return f"{next(ticks)} {'x' * BYTES}"

    with gr.Blocks() as blocks:
        with gr.Tabs(elem_id="tabs"):
            for number in range(TABS):
                with gr.Tab(f"tab {number}", id=number):
                    gr.Textbox(label=f"field {number}")
        brought = gr.Textbox(visible=False)
        gr.Timer(1).tick(refresh, None, brought, queue=False)
    return blocks


def main() -> None:
    parent = FastAPI(docs_url=None, openapi_url=None)

    @parent.get("/health")
    def health() -> str:
        return "ok"

    app = gr.mount_gradio_app(parent, page(), path="/bare", footer_links=[], enable_monitoring=False)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
