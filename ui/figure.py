"""A plotly figure that keeps its zoom while data arrives. (gr.Plot builds its picture anew at every change.) What is
drawn is plots' business."""

from typing import Any

from ui.component import Data, when_ready


class Figure(Data):
    """value: a figure as `plotly.graph_objects.Figure.to_plotly_json()` gives it, or None, which shows `empty`.

    Zoom and hidden traces are kept as long as `layout.uirevision` stays the same. Colours follow light and dark: leave
    paper, background, font and grid colours out of the layout. height: pixels."""

    def __init__(self, empty: str, *, height: int = 260, **given: Any):
        super().__init__(
            None,
            html_template="<div class='k-figure'><div class='k-plot'></div><div class='k-empty'></div></div>",
            js_on_load=when_ready("katherine.figure(element, props, watch)"),
            apply_default_css=False,
            empty=empty,
            height=height,
            **given,
        )
