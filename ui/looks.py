"""How both pages look: theme, style sheet, scripts. System fonts only: nothing is fetched from elsewhere."""

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

# plotly.js is the copy inside the Python package, so that both are of one version.
HEAD = """
<meta name="robots" content="noindex">
<link rel="stylesheet" href="/static/katherine.css?v={version}">
<script src="/static/katherine.js?v={version}"></script>
<script id="katherine-plotly" src="/static/plotly.min.js?v={version}" defer></script>
"""


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
    )
