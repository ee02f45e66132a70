"""A value that the page itself keeps and sends along, shown nowhere. (gr.State is kept by the server: an answer that is
lost on the way leaves it ahead of the page, and a restart forgets it.)"""

from typing import Any

from ui.component import HTML


def held(value: Any) -> HTML:
    return HTML(value, html_template="", js_on_load=None, apply_default_css=False, visible="hidden")
