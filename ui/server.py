"""The web process: a FastAPI parent with the two Gradio pages mounted under it. Who may come in is the door's."""

import os
import tempfile

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="katherine-uploads-")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from katherine.settings import Home
from ui import looks, operator, review
from ui.panel import Panel



def create(home: Home) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    panel = Panel.of(home)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/")
    def first() -> RedirectResponse:
        return RedirectResponse("/operator/")

    @app.get("/static/plotly.min.js")
    def plotly_js() -> FileResponse:
        return FileResponse(looks.PLOTLY, headers={"Cache-Control": "max-age=604800"})

    app.mount("/static", StaticFiles(directory=looks.STATIC))
    for path, page in (("/operator", operator.build(panel)), ("/review", review.build(panel))):
        gr.mount_gradio_app(
            app,
            page,
            path,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size="95mb",
            theme=looks.theme(),
            head=looks.head(),
        )
    return app


def serve(home: Home, port: int = 7860) -> None:
    uvicorn.run(create(home), host="0.0.0.0", port=port, log_level="warning")
