"""The audit log as the publish tab shows it: whether its chain holds, and what was done, newest first. What is in it is
katherine.audit's."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from katherine import audit
from katherine.errors import KatherineError
from katherine.settings import Home
from katherine.units import moment
from ui import files
from ui.table import Cell, Table
from ui.told import Told

# As many lines as somebody reads on a page; the download has them all.
SHOWN = 200
_TONES = {
    "approved": "good",
    "push": "good",
    "withdrawn": "warn",
    "refused": "bad",
    audit.TORN: "warn",
    "unreadable": "bad",
}


class Logbook:
    """The components, and what they show."""

    def __init__(self) -> None:
        gr.HTML("Audit log", elem_classes="k-section")
        self.chain = gr.HTML("", apply_default_css=False)
        self.lines = Table(
            ("Line#", "When", "What", "Who", "Role", "About"),
            "Nothing has been approved, withdrawn or pushed yet.",
            elem_classes="k-log-lines",
        )

    @property
    def outputs(self) -> list[Any]:
        return [self.chain, self.lines]

    def show(self, told: Told, home: Home) -> None:
        try:
            entries, broken = audit.read(home), audit.broken(home)
        except KatherineError as error:
            told.say("chain", self.chain, Markup('<p class="k-bad">{}</p>').format(str(error)))
            return
        told.say("chain", self.chain, _chain(len(entries), broken, any(entry.torn for entry in entries)))
        rows = [
            [
                Cell(str(entry.number), sort=entry.number),
                Cell(_when(entry.time), sort=entry.time),
                Cell(entry.event, tone=_TONES.get(entry.event, "")),
                entry.who,
                entry.role,
                audit.words(entry),
            ]
            for entry in reversed(entries[-SHOWN:])
        ]
        told.tell("lines", self.lines, rows, lambda: self.lines.rows(rows))


def _chain(count: int, broken: str, torn: bool) -> Markup:
    if not count:
        return Markup()
    if broken:
        said = Markup('<p class="k-bad"><span class="k-tone k-bad">The chain is broken</span>. {}</p>').format(broken)
    else:
        more = " A line that a dying machine did not finish is marked." if torn else ""
        less = f" The newest {SHOWN} are shown." if count > SHOWN else ""
        said = Markup('<p><span class="k-tone k-good">The chain holds</span> over {}{}{}</p>').format(
            f"{count:,} {'line' if count == 1 else 'lines'}.", more, less
        )
    link = Markup('<div class="k-files"><a href="{}" download>audit.jsonl</a></div>').format(files.AUDIT)
    return said + link


def _when(time: str) -> str:
    """Empty for what is no time: a line can hold anything once somebody wrote into it."""
    try:
        return moment(time)
    except ValueError:
        return time
