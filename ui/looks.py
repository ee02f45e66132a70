"""How both pages look: theme, style sheets, scripts. System fonts only: nothing is fetched from elsewhere."""

import hashlib
from pathlib import Path

import gradio as gr
import plotly

STATIC = Path(__file__).parent / "static"
# The copy inside the Python package, so that figures are drawn by the version that described them.
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=_FONT,
        font_mono=_MONO,
        spacing_size=gr.themes.sizes.spacing_sm,
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_md,
    ).set(
        # The defaults are too faint to read in sunlight: these have a contrast of 4.7 and more with the background.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        # White on the accent's middle tone has a contrast of 2.5; on this one 5.5.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        layout_gap="10px",
    )


def head() -> str:
    """What goes into a page's head. Each address carries a mark of the file's content: caches may keep it for ever."""
    sheets = [f'<link rel="stylesheet" href="{_address(path)}">' for path in sorted(STATIC.glob("*.css"))]
    scripts = [f'<script src="{_address(path)}"></script>' for path in sorted(STATIC.glob("*.js"))]
    # plotly.js is 5 MB: it loads beside the page, and figures are drawn when it has come.
    later = f'<script id="katherine-plotly" src="/static/plotly.min.js?v={plotly.__version__}" defer></script>'
    return "\n".join(['<meta name="robots" content="noindex">', *sheets, *scripts, later])


def _address(path: Path) -> str:
    return f"/static/{path.name}?v={hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
