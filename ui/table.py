"""A table that sorts, selects and stays put while it updates. Cells are text: nothing in them is ever read as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ui.component import Data, when_ready


@dataclass(frozen=True, slots=True)
class Cell:
    """text: what is shown. sort: what it is ordered by, where that is not the text (a number or a string). tone: how
    it looks: "good", "bad", "warn", "busy", "dim" or "". link: a path of this panel to open, never data's. whole: the
    text in full where it is shortened, shown at the pointer."""

    text: str
    sort: float | str | None = None
    tone: str = ""
    link: str = ""
    whole: str = ""


class Table(Data):
    """Rows of `Cell` (or plain values) under `columns`. A numeric column's label ends with "#", which is not shown.
    `table.select(handler)` hears clicks on rows; the handler's `event: gr.EventData` has `event.id`, the row's id.
    `empty` is what to do next when there are no rows."""

    def __init__(self, columns: Sequence[str], empty: str, *, selects: bool = False, **given: Any):
        self._columns = list(columns)
        self._empty = empty
        self._selects = selects
        super().__init__(
            self.rows([]),
            html_template="<div class='k-table'></div>",
            js_on_load=when_ready("katherine.table(element, props, watch, (id) => trigger('select', {id}))"),
            apply_default_css=False,
            **given,
        )

    def rows(
        self, rows: Sequence[Sequence[Any]], ids: Sequence[str] | None = None, selected: str | None = None
    ) -> dict[str, Any]:
        """The value to return from a handler. ids: one a row, where rows can be selected."""
        return {
            "columns": self._columns,
            "rows": [[_cell(cell) for cell in row] for row in rows],
            "ids": list(ids) if ids is not None and self._selects else None,
            "selected": selected,
            "empty": self._empty,
        }


def _cell(value: Any) -> Any:
    """As JavaScript takes it: text alone where there is nothing else, so that 500 rows stay small."""
    if not isinstance(value, Cell):
        return "" if value is None else value
    if value.sort is None and not value.tone and not value.link and not value.whole:
        return value.text
    return {"t": value.text, "s": value.sort, "c": value.tone, "h": value.link, "w": value.whole}
