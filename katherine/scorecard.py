"""A probe run read back: probe × column, pass rates with how far they carry, and what differs between two columns or
two runs. The scores are probes', the formulas statistics'; nothing is scored anew here."""

import csv
import functools
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from katherine import outcomes, probes, probesets, statistics
from katherine.errors import DataError
from katherine.history import Seen
from katherine.probes import Answer
from katherine.probesets import Probe
from katherine.runs import Run
from katherine.shelf import inert

# A run's answers are a megabyte at most; a page looks at two runs, and a few people at a few more.
_KEPT = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One probe of a run. question: the last one asked. probe: as the run froze it, None where it did not. answers:
    model → what it said; one that was not asked is not in it."""

    id: str
    category: str
    question: str
    probe: Probe | None
    answers: Mapping[str, Answer]

    @property
    def failed(self) -> int:
        return sum(each.score.passed is False for each in self.answers.values())

    @property
    def undecided(self) -> int:
        return sum(each.score.passed is None for each in self.answers.values())


@dataclass(frozen=True, slots=True)
class Rate:
    """passed of decided, with its 95% interval (shares, 0 to 1). undecided: those that are for a person."""

    passed: int
    decided: int
    undecided: int

    @property
    def interval(self) -> tuple[float, float]:
        return statistics.wilson(self.passed, self.decided)

    def words(self) -> str:
        """ "23 of 26, 71 to 96%"; empty where nothing was decided."""
        if not self.decided:
            return ""
        low, high = self.interval
        return f"{self.passed} of {self.decided}, {low * 100:.0f} to {high * 100:.0f}%"


@dataclass(frozen=True, slots=True)
class Difference:
    """Two columns on the probes that both were asked and that rules decided for both: so many, of which each passed so
    many. only_first, only_second: ids of those that one passed and the other failed. chance: p of McNemar's exact
    test, `raised` by Holm's rule for as many differences as are looked at together. rules_changed: probes whose rules
    are others in the second run."""

    first: str
    second: str
    both: int
    passed_first: int
    passed_second: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    chance: float
    raised: float
    rules_changed: tuple[str, ...] = ()

    def words(self) -> str:
        if not self.both:
            return "no probe in common"
        if not (self.only_first or self.only_second):
            return "no difference"
        return statistics.in_words(self.raised)


@dataclass(frozen=True, slots=True)
class Scorecard:
    """models: in the order in which they were asked. rows: in the set's order. set_name: "" where it was not kept.
    asked: probes in the set, None where it was not kept."""

    run: Run
    models: tuple[str, ...]
    rows: tuple[Row, ...]
    set_name: str
    asked: int | None

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(row.category for row in self.rows))

    def row(self, probe_id: str) -> Row | None:
        return next((row for row in self.rows if row.id == probe_id), None)

    def rate(self, model: str, category: str | None = None) -> Rate:
        """Of one model, on all probes or on those of a category."""
        scores = [
            row.answers[model].score.passed
            for row in self.rows
            if model in row.answers and category in (None, row.category)
        ]
        return Rate(scores.count(True), len(scores) - scores.count(None), scores.count(None))

    def worst_first(self) -> list[Row]:
        """Failed by most columns first, then what is for a person, then in the set's order."""
        return sorted(self.rows, key=lambda row: (-row.failed, -row.undecided))

    def differences(self) -> list[Difference]:
        """Between any two files, the least likely by chance first. The base and the adapters are not among them: they
        are asked a few probes only, to show what training did."""
        files = [model for model in self.models if is_file(model)]
        found = [_difference(self, one, self, other) for one, other in itertools.combinations(files, 2)]
        return sorted(_raised([each for each in found if each.both]), key=lambda each: each.chance)

    def against(self, past: "Scorecard") -> list[Difference]:
        """This run's columns with those of a past one that go by the same name, on the probes with the same id and the
        same questions; `first` is the past."""
        return _raised([_difference(past, model, self, model) for model in self.models if model in past.models])

    def asked_otherwise(self, past: "Scorecard") -> list[str]:
        """In what a past run was asked otherwise, in words: its answers may differ for that alone."""
        mine, theirs = self.run.record.recipe, past.run.record.recipe
        named = {"max_new_tokens": "longest answer", "temperature": "temperature", "seed": "seed"}
        return [
            f"{words} {theirs.get(name)}, here {mine.get(name)}"
            for name, words in named.items()
            if mine.get(name) != theirs.get(name)
        ]


def read(run: Run) -> Scorecard:
    """Of a probe run, while it is under way of what it has so far; runs of before the set was kept have answers alone.
    Raises DataError where a file of it is damaged."""
    return _read(run, _mark(run.out / probes.ANSWERS), _mark(run.out / probes.FROZEN))


@functools.lru_cache(maxsize=_KEPT)
def _read(run: Run, answers: tuple[int, int], frozen: tuple[int, int]) -> Scorecard:
    said: dict[str, dict[str, Answer]] = {}
    models: dict[str, None] = {}
    for each in probes.answers(run.out):
        if len(each.talk) < 2:
            raise DataError(f"{run.out / probes.ANSWERS} has an answer without a question: run the probes again.")
        said.setdefault(each.probe, {})[each.model] = each
        models[each.model] = None
    asked = probes.frozen(run.out)
    known = {probe.id: probe for probe in asked.probe} if asked else {}
    rows = []
    for probe_id in [*(name for name in known if name in said), *(name for name in said if name not in known)]:
        one = next(iter(said[probe_id].values()))
        rows.append(Row(probe_id, one.category, one.talk[-2].content, known.get(probe_id), said[probe_id]))
    return Scorecard(run, tuple(models), tuple(rows), asked.name if asked else "", len(known) if asked else None)


def _mark(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def comparable(among: Sequence[Seen], card: Scorecard) -> list[Seen]:
    """Other probe runs that answered something, in the order given."""
    return [
        seen
        for seen in among
        if seen.kind == "probe" and seen.id != card.run.id and _mark(seen.run.out / probes.ANSWERS)[1]
    ]


def _difference(first: Scorecard, one: str, second: Scorecard, other: str) -> Difference:
    left, right, changed = [], [], []
    both = passed_first = passed_second = 0
    theirs = {row.id: row for row in second.rows}
    for row in first.rows:
        match = theirs.get(row.id)
        if match is None or one not in row.answers or other not in match.answers:
            continue
        a, b = row.answers[one], match.answers[other]
        if a.score.passed is None or b.score.passed is None or _questions(a) != _questions(b):
            continue
        both += 1
        passed_first += a.score.passed
        passed_second += b.score.passed
        if row.probe and match.probe and row.probe.rules() != match.probe.rules():
            changed.append(row.id)
        if a.score.passed and not b.score.passed:
            left.append(row.id)
        elif b.score.passed and not a.score.passed:
            right.append(row.id)
    chance = statistics.mcnemar(len(left), len(right))
    return Difference(
        one, other, both, passed_first, passed_second, tuple(left), tuple(right), chance, chance, tuple(changed)
    )


def _raised(found: list[Difference]) -> list[Difference]:
    chances = statistics.holm([each.chance for each in found])
    return [replace(each, raised=raised) for each, raised in zip(found, chances, strict=True)]


def _questions(answer: Answer) -> list[str]:
    return [message.content for message in answer.talk if message.role == "user"]


def verdict(answer: Answer | None) -> str:
    """ "passed", "failed", "for the reviewer", or empty where it was not asked."""
    if answer is None:
        return ""
    return {True: "passed", False: "failed", None: "for the reviewer"}[answer.score.passed]


def named(model: str) -> str:
    """A column's name where there is little room: "q4_k_m", "export-25b57f q4_k_m", "base". Two bases that were asked
    differ in what follows the colon."""
    run, found, quant = model.partition(":")
    if not found:
        return model
    if run == "base":
        return f"base {quant}"
    return f"{run.split('-', 2)[-1]} {quant}"


def as_csv(card: Scorecard) -> Iterator[str]:
    """A line an answer, for a spreadsheet: what was asked and said, and what decided."""
    out = io.StringIO()
    write = csv.writer(out).writerow
    write(["probe", "category", "model", "result", "question", "answer", "broken or unclear", "held", "sha256"])
    for row in card.rows:
        for model, each in row.answers.items():
            cells = [row.id, row.category, model, verdict(each), row.question, each.talk[-1].content]
            cells += ["\n".join(each.score.reasons), "\n".join(each.score.held), each.sha256]
            write([inert(cell) for cell in cells])
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    yield out.getvalue()


def is_file(model: str) -> bool:
    """Whether a model is a GGUF: the export's own, or one that was asked beside them."""
    return ":" in model or outcomes.is_file(model)


def rules_of(row: Row) -> list[str]:
    """What the answers of a row were held against, in words."""
    if row.probe is None:
        return []
    always = ["says something", "shows no <think>"]
    if row.probe.must_end:
        always.insert(1, "ends by itself")
    mine = [rule for rule in row.probe.rules() if rule != probesets.MAY_RUN_ON]
    return [*always, *mine]
