"""Any two runs side by side: what was asked of them, on what they ran, what came of them. Also how one run differs from
the preset nearest to it. Curves are read by curves; showing is the page's."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from katherine import outcomes, recipe
from katherine.errors import KatherineError
from katherine.history import History, Seen
from katherine.recipe import KINDS
from katherine.runs import RunRecord
from katherine.settings import Home


@dataclass(frozen=True, slots=True)
class Pair:
    """A value of each of two runs, as JSON keeps it; None where a run has no such thing."""

    name: str
    a: Any
    b: Any

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True, slots=True)
class Comparison:
    """asked and versions hold only what differs; results holds all that either run has, equal or not.

    asked: dataset and its fingerprint, parent, revision, then recipe values as "sft.learning_rate", the recipes of the
    runs they build on included. equal: how many recipe values are the same. dollars and the like are pages' business.
    """

    a: Seen
    b: Seen
    asked: tuple[Pair, ...]
    versions: tuple[Pair, ...]
    results: tuple[Pair, ...]
    equal: int


def compare(history: History, a: str, b: str, among: Sequence[Seen] | None = None) -> Comparison:
    """among: the history's runs, where they have just been read. Raises NotFound or DataError for either run,
    KatherineError where both are one."""
    if a == b:
        raise KatherineError(f"Run {a} is compared with itself: choose another.")
    known = {seen.id: seen for seen in (history.runs() if among is None else among)}
    one, other = known.get(a) or history.get(a), known.get(b) or history.get(b)
    mine, theirs = one.run.record, other.run.record
    recipes = list(_paired(_recipes(one, known), _recipes(other, known)))
    asked = [*_paired(_circumstances(mine), _circumstances(theirs)), *recipes]
    return Comparison(
        one,
        other,
        tuple(pair for pair in asked if pair.differs),
        tuple(pair for pair in _paired(mine.versions, theirs.versions) if pair.differs),
        tuple(_paired(outcomes.figures(one.run, one.status), outcomes.figures(other.run, other.status))),
        sum(not pair.differs for pair in recipes),
    )


def facts(history: History, seen: Seen) -> dict[str, Any]:
    """One run as JSON values: its record, its state, what came of it in words and in figures, its children."""
    status = seen.status
    return asdict(seen.run.record) | {
        "state": "damaged" if seen.damage else str(status.state),
        "reason": seen.damage or status.reason,
        "remedy": status.remedy,
        "seconds": round(status.seconds, 1),
        "attempt": status.attempt,
        "started": status.started,
        "ended": status.ended,
        "result": history.outcome(seen).words(),
        "figures": outcomes.figures(seen.run, status),
        "children": [child.id for child in history.children(seen.id)],
    }


def nearest_preset(home: Home, record: RunRecord) -> tuple[str, dict[str, Any]]:
    """The preset from which the run's recipe differs least, the first of equals, and that preset's values of this
    kind. ("", {}) for a kind of run that has no recipe of its own."""
    if record.kind not in KINDS:
        return "", {}
    best: tuple[int, str, dict[str, Any]] | None = None
    for name in recipe.preset_names(home):
        try:
            values = recipe.preset(name, KINDS[record.kind], home=home).model_dump(mode="json")
        except KatherineError:
            continue  # a saved preset that is damaged
        apart = sum(pair.differs for pair in _paired(record.recipe, values))
        if best is None or apart < best[0]:
            best = apart, name, values
    return ("", {}) if best is None else best[1:]


def text(value: Any) -> str:
    """A value as a person reads it: 0.0001, not 1e-04; a list with spaces; "yes" and "no"; "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        short = f"{value:.6g}"
        # Learning rates are read as 0.00005; what is smaller than any of them, in powers of ten.
        return f"{Decimal(short):f}" if "e-" in short and abs(value) >= 1e-7 else short
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return " ".join(text(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Pair]:
    for name in [*a, *(name for name in b if name not in a)]:
        yield Pair(name, a.get(name), b.get(name))


def _circumstances(record: RunRecord) -> dict[str, Any]:
    inputs = {f"{name} (sha256)": value[:12] for name, value in record.inputs.items()}
    return {
        "kind": record.kind,
        "dataset": record.dataset,
        **inputs,
        "parent": record.parent,
        "revision": record.revision,
    }


def _recipes(seen: Seen, known: Mapping[str, Seen]) -> dict[str, Any]:
    """The recipe values of the run and of those it builds on, as "kind.name"; the run nearest to it counts."""
    line = [seen.run.record]
    while line[-1].parent in known and len(line) <= len(known):
        line.append(known[str(line[-1].parent)].run.record)
    found: dict[str, Any] = {}
    for record in reversed(line):
        found |= {f"{record.kind}.{name}": value for name, value in record.recipe.items()}
    return found
