"""What would be started next, in words. The draft is katherine.drafts', what it takes is estimate's, and what stands in
its way jobs.pipeline's."""

import time
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jobs import pipeline
from katherine import drafts, estimate
from katherine.drafts import Draft
from katherine.errors import KatherineError
from katherine.recipe import KINDS
from katherine.settings import Home
from katherine.units import dollars
from ui.forms import as_text
from ui.runs import named


class Upcoming:
    """Made again when the draft changed, and sometimes, since a GPU or a dataset may come or go."""

    # Obstacles ask the driver, and the estimate reads what past runs took: not at every look of every open page.
    SECONDS = 20.0

    def __init__(self, home: Home):
        self._home = home
        self._made: tuple[Any, float, Draft, str] | None = None

    def get(self) -> tuple[Draft, str]:
        """The draft, and the page's words for it: what stands in the way of starting it included."""
        mark = _stamp(drafts.path(self._home))
        made = self._made
        if made is None or made[0] != mark or time.monotonic() - made[1] > self.SECONDS:
            draft = drafts.load(self._home)
            made = self._made = (mark, time.monotonic(), draft, _drafted(self._home, draft))
        return made[2], made[3]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _drafted(home: Home, draft: Draft) -> str:
    asked = {kind: values for kind, values in draft.asked().items() if values is not None}
    stages = " → ".join(named(kind) for kind in asked)
    if draft.dataset is None:
        return Markup(
            "<p>Preset <b>{}</b>, {}</p><p class='k-warn'>No dataset is chosen: on the Dataset tab, "
            "drop files in, or use one that is there.</p>"
        ).format(draft.preset, stages)
    parts = [Markup("<p>Next: <b>{}</b>, preset <b>{}</b>, {}</p>").format(draft.dataset, draft.preset, stages)]
    if line := _estimated(home, draft):
        parts.append(Markup("<p>{}</p>").format(line))
    if changed := _changes(home, draft):
        parts.append(Markup("<p class='k-dim'>Changed: {}</p>").format("; ".join(changed)))
    try:
        against = pipeline.obstacles(home, draft.dataset, asked)
    except KatherineError as error:
        against = [str(error)]
    if against:
        reasons = Markup("").join(Markup("<li>{}</li>").format(reason) for reason in against)
        parts.append(Markup("<ul class='k-against k-bad'>{}</ul>").format(reasons))
    return Markup("").join(parts)


def _estimated(home: Home, draft: Draft) -> str:
    """Steps, time, memory and dollars on this machine, in one line; what is not known is left out."""
    try:
        plan = estimate.plan(home, draft)
    except KatherineError as error:
        return str(error)
    here = next((each for each in plan.estimates if each.machine.here), None)
    steps = [f"{named(kind)} {count:,} steps" for kind, count in plan.steps.items() if count is not None]
    if here is None:
        return ", ".join(steps)
    part = bool(here.missing)
    said = [
        estimate.words(here.seconds, estimate.roughly, at_least=part),
        estimate.words(here.memory, estimate.gib),
        estimate.words(here.dollars, dollars, at_least=part),
    ]
    return f"On {here.machine.name}: {', '.join([*steps, *filter(None, said)])}" if steps or any(said) else ""


def _changes(home: Home, draft: Draft) -> list[str]:
    """ "SFT: Learning rate 5e-5 instead of 1e-4"."""
    try:
        found = drafts.differences(home, draft)
    except KatherineError:
        return []  # the preset is gone; the values are still what is started
    said = []
    for each in found:
        yours, theirs = (as_text(KINDS[each.kind], each.about.name, value) for value in (each.yours, each.theirs))
        said.append(f"{named(each.kind)}: {each.about.label} {yours} instead of {theirs}")
    return said
