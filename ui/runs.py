"""How a run is put into words and cells, the same on every tab that lists or describes runs. What is true of it is
katherine's to say."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from katherine.history import History, Seen
from katherine.outcomes import Outcome
from katherine.units import dollars, duration, moment, size
from ui import files, tones
from ui.table import Cell

KINDS = {"sft": "SFT", "dpo": "DPO", "export": "Export", "probe": "Probes"}


def named(kind: str) -> str:
    """A kind of run as a page calls it; one that a later version made goes by its own name."""
    return KINDS.get(kind, kind)


def state(seen: Seen) -> Cell:
    """The state, with how far it is while it is under way."""
    status = seen.status
    text = str(status.state)
    if status.pid is not None and status.of:
        text = f"{text}, {status.step:,} of {status.of:,}"
    return Cell(text, tone=tones.of(status.state))


def result(outcome: Outcome) -> Cell:
    """What came of it; ordered by the last loss, or the share that was accepted or passed."""
    order: float | str = ""
    if outcome.files:
        order = outcome.accepted / len(outcome.files)
    elif outcome.asked:
        order = outcome.passed / outcome.asked
    elif outcome.last_loss is not None:
        order = outcome.last_loss
    bad = outcome.damage or (outcome.files and outcome.accepted < len(outcome.files))
    return Cell(outcome.words(), sort=order, tone="bad" if bad else "")


def took(seen: Seen) -> Cell:
    # Whole minutes while it runs: a table that is sent anew each second is never at rest.
    seconds = seen.status.seconds if seen.status.ended else seen.status.seconds // 60 * 60
    return Cell(duration(seconds) if seen.status.started else "", sort=seconds if seen.status.started else "")


def cost(seen: Seen, outcome: Outcome) -> Cell:
    if outcome.hourly is None or not seen.status.started:
        return Cell("", sort="")
    amount = outcome.hourly * seen.status.seconds / 3600
    return Cell(dollars(amount), sort=round(amount, 4))


def option(history: History, seen: Seen) -> str:
    """A run in a drop-down list."""
    words = history.outcome(seen).words()
    said = [tones.short(seen.id), moment(seen.run.record.created), words or str(seen.status.state)]
    return " · ".join(said)


def head(seen: Seen, outcome: Outcome) -> Markup:
    """The run in a few lines: what, how it ended and why, and what there is to take away."""
    record, status = seen.run.record, seen.status
    parts = [
        Markup('<div class="k-run-head"><h3>{}</h3>').format(record.id),
        Markup('<p><span class="k-tone k-{}">{}</span>{}</p>').format(
            tones.of(status.state), state(seen).text, f" · {outcome.words()}" if outcome.words() else ""
        ),
    ]
    if status.reason:
        parts.append(Markup("<p>{} {}</p>").format(status.reason, status.remedy))
    facts = {
        "Asked for": f"{moment(record.created)} by {record.who}",
        "Took": duration(status.seconds) if status.ended and status.started else "",
        "Attempts": str(status.attempt) if status.attempt > 1 else "",
        "Dataset": record.dataset or "",
        "Cost": f"{cost(seen, outcome).text} at {dollars(outcome.hourly)} an hour"
        if outcome.hourly is not None
        else "",
    }
    return Markup().join([*parts, described(facts.items()), Markup("</div>")])


def described(facts: Iterable[tuple[str, str]]) -> Markup:
    """Short facts in a row; those without a text are left out."""
    each = [Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, text) for name, text in facts if text]
    return Markup('<dl class="k-facts">{}</dl>').format(Markup().join(each)) if each else Markup()


def downloads(seen: Seen, leave_out: Sequence[str] = ()) -> Markup:
    """A link for each file of the run; `leave_out`: beginnings of names that stand elsewhere."""
    links = [
        Markup('<a href="{}" download>{}</a>').format(file["address"], f"{file['name']} ({size(file['bytes'])})")
        for file in files.listing(seen.run)
        if not file["name"].startswith(tuple(leave_out))
    ]
    return Markup('<div class="k-files">{}</div>').format(Markup(" ").join(links)) if links else Markup()
