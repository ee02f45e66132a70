"""What a page was last sent, so that only what changed is sent again. The page keeps the marks itself (ui.held), so
they are gone with a reload, after which everything is sent anew, and an answer that is lost takes its marks with it."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import gradio as gr
from markupsafe import Markup

from ui.table import Cell


class Told:
    """values: what is to be sent now, by component. marks: of all that the page shows once it has been."""

    def __init__(self, marks: dict[str, str] | None):
        self.marks = dict(marks or {})
        self.values: dict[Any, Any] = {}

    def is_news(self, name: str, content: Any) -> bool:
        """Whether the content is another than was sent last; from here on it counts as sent."""
        text = json.dumps(content, default=_plain)
        mark = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.marks.get(name) == mark:
            return False
        self.marks[name] = mark
        return True

    def tell(self, name: str, component: Any, content: Any, value: Callable[[], Any]) -> None:
        """`value()` for the component, if `content`, of which it is made, is news."""
        if self.is_news(name, content):
            self.values[component] = value()

    def say(self, name: str, component: Any, text: Markup) -> None:
        self.tell(name, component, text, lambda: text)

    def visible(self, name: str, component: Any, shown: bool) -> None:
        self.tell(name, component, shown, lambda: gr.update(visible=shown))


def _plain(value: Any) -> Any:
    if isinstance(value, Cell):
        return [value.text, value.sort, value.tone, value.link, value.whole]
    raise TypeError(type(value))
