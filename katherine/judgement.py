"""What the verdicts on an export amount to, with the labels taken off: which quant people prefer, whether they agree,
which answers are worst. It counts and words what was counted. Reading verdicts is reviews', what is learned from them
feedback's."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from katherine import probes, reviews
from katherine.errors import DataError
from katherine.examples import Message
from katherine.intake import digest
from katherine.reviews import Judged, Recommendation, Verdict
from katherine.runs import Run
from katherine.settings import Home
from katherine.statistics import wilson

# Below this many questions Krippendorff's alpha moves by a third with a single answer: no figure is better than that.
ENOUGH = 10
# Krippendorff, Content Analysis (2004), chapter 11: from 0.8 on data can be relied on, from 0.667 tentatively.
RELIABLE, TENTATIVE = 0.8, 0.667
# Probe runs whose answers are remembered; an export has a few.
_KEPT = 16

# Quant, the conversation up to the answer, the answer.
Said = tuple[str, tuple[Message, ...], str]
Broken = Callable[[Verdict, Judged], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Standing:
    """How one quant did. shown: verdicts in which it answered. first: of these, how often it stood first. compared: in
    how many one answer was preferred. preferred: how often its words were (two quants that say the same share it).
    expected: how often that would be by chance. low, high: the 95% interval of preferred of compared, as shares.
    ties, none_good: verdicts that said so. up, down, rewritten: of its answers."""

    column: str
    quant: str
    shown: int
    first: int
    compared: int
    preferred: int
    expected: float
    low: float
    high: float
    ties: int
    none_good: int
    up: int
    down: int
    rewritten: int

    @property
    def leans(self) -> int:
        """1 where it was preferred more often than chance explains, -1 where less often, 0 where that is open."""
        if not self.compared:
            return 0
        chance = self.expected / self.compared
        return (self.low > chance) - (self.high < chance)

    def words(self) -> str:
        if not self.compared:
            return "not compared yet"
        share = f"{self.preferred} of {self.compared}, so between {self.low:.0%} and {self.high:.0%} of the time"
        chance = f"chance alone would give {self.expected / self.compared:.0%}"
        found = {1: "preferred more often than by chance", -1: "preferred less often than by chance"}
        return f"{found.get(self.leans, 'no clear difference yet')}: {share}; {chance}"


@dataclass(frozen=True, slots=True)
class Position:
    """Whether place decides. decided: verdicts that preferred one answer. places: how often each place was preferred,
    first to last. expected: of the first, by chance. low, high: the 95% interval of the first place's share."""

    decided: int
    places: tuple[int, ...]
    expected: float
    low: float
    high: float

    @property
    def leans(self) -> int:
        """1 where the first one shown is preferred more often than chance explains, -1 less often, 0 no sign of it."""
        if not self.decided:
            return 0
        chance = self.expected / self.decided
        return (self.low > chance) - (self.high < chance)

    def words(self) -> str:
        if not self.decided:
            return "Nothing was preferred yet, so nothing can be said about the order in which answers stand."
        share = (
            f"The answer shown first was preferred {_times(self.places[0])} of {self.decided} "
            f"({self.low:.0%} to {self.high:.0%}); by chance it would be about {self.expected:.0f}."
        )
        if not self.leans:
            return share + " No sign that the order decides."
        found = "more than chance: people lean to the first" if self.leans > 0 else "less than chance: they lean away"
        return share + f" That is {found}. The order is shuffled, so it favours no quant, but it blurs the differences."


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of people who judged the same question of the same set. questions: judged by two or more. same_answers: of these,
    where all of them read the same words. people: who took part. comparisons: pairs of people on one question. agreed:
    of these. alpha: Krippendorff's, nominal; None below ENOUGH questions, or where all verdicts are the same."""

    questions: int
    same_answers: int
    people: int
    comparisons: int
    agreed: int
    alpha: float | None

    def words(self) -> str:
        if not self.questions:
            return "No question of a set was judged by two people yet, so nothing can be said about agreement."
        if self.questions == 1:
            said = f"{self.people} people judged one and the same question. "
        else:
            said = f"{self.questions} questions were judged by two or more of {self.people} people. "
        said += f"Compared two by two, they said the same in {self.agreed} of {self.comparisons} "
        said += f"({self.agreed / self.comparisons:.0%}). "
        if self.same_answers < self.questions:
            said += f"They read the very same answers in {self.same_answers} of {self.questions}. "
        if self.questions < ENOUGH:
            return said + f"Too few to tell agreement from chance: that takes {ENOUGH} questions."
        if self.alpha is None:
            return said + "All verdicts are the same, so chance cannot be told from agreement."
        return (
            said
            + f"Beyond chance (Krippendorff's alpha, 1 is perfect, 0 is chance): {self.alpha:.2f}, "
            + (
                "so one person's verdict speaks for the others."
                if self.alpha >= RELIABLE
                else "so conclusions are tentative."
                if self.alpha >= TENTATIVE
                else "so people differ in taste, or the answers hardly differ: do not rest on one person's verdict."
            )
        )


@dataclass(frozen=True, slots=True)
class Note:
    """Something somebody wrote. answer: what it is about, "" for the export as a whole."""

    reviewer: str
    time: str
    quant: str
    question: str
    answer: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Bad:
    """An answer that somebody disliked, rewrote or found no better than the others, or that breaks its probe's rules.
    Several people's verdicts on the same words of the same quant are one of these. id: of the answer's content.
    verdict: the newest that minds it, or the newest of all. down, none_good: who said so. rewrites: (who, text)."""

    id: str
    verdict: Verdict
    judged: Judged
    down: tuple[str, ...]
    up: tuple[str, ...]
    none_good: tuple[str, ...]
    broken: tuple[str, ...]
    rewrites: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Reviewer:
    """How far one person came. sets: probe set → questions of it they judged. free: judged questions of their own.
    last: ISO 8601. recommendation: their last word, or None."""

    name: str
    role: str
    judged: int
    sets: Mapping[str, int]
    free: int
    last: str
    recommendation: Recommendation | None


@dataclass(frozen=True, slots=True)
class Judgement:
    verdicts: int
    reviewers: tuple[Reviewer, ...]
    standings: tuple[Standing, ...]
    position: Position
    agreement: Agreement
    worst: tuple[Bad, ...]
    notes: tuple[Note, ...]


def of(
    verdicts: Sequence[Verdict],
    recommendations: Sequence[Recommendation] = (),
    broken: Broken = lambda verdict, judged: (),
) -> Judgement:
    """Everything of one export. Both lists hold what counts, as reviews gives them. broken: which rules of its probe an
    answer breaks, in words."""
    return Judgement(
        len(verdicts),
        reviewers(verdicts, recommendations),
        standings(verdicts),
        position(verdicts),
        agreement(verdicts),
        worst(verdicts, broken),
        notes(verdicts, recommendations),
    )


# ------------------------------------------------------------------------------------------------------ preferences


def preferred(verdict: Verdict) -> frozenset[str]:
    """The columns whose words were preferred: quants that said the same share it. Empty where none was, or where all
    said the same, since then there was nothing to prefer."""
    words = {answer.column: answer.text.strip() for answer in verdict.answers}
    if verdict.preferred not in words:
        return frozenset()
    same = frozenset(column for column, text in words.items() if text == words[verdict.preferred])
    return same if len(same) < len(words) else frozenset()


def standings(verdicts: Iterable[Verdict]) -> tuple[Standing, ...]:
    """One a column, those that lead first."""
    quants: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    expected: dict[str, float] = {}
    for verdict in verdicts:
        chosen = preferred(verdict)
        for judged in verdict.answers:
            column = judged.column
            quants[column] = judged.quant
            counts[column, "shown"] += 1
            counts[column, "first"] += verdict.order[:1] == (column,)
            counts[column, "ties"] += verdict.tie
            counts[column, "none_good"] += verdict.none_good
            counts[column, "up"] += judged.thumb > 0
            counts[column, "down"] += judged.thumb < 0
            counts[column, "rewritten"] += bool(judged.rewrite.strip())
            if chosen:
                counts[column, "compared"] += 1
                counts[column, "preferred"] += column in chosen
                same = sum(other.text.strip() == judged.text.strip() for other in verdict.answers)
                expected[column] = expected.get(column, 0.0) + same / len(verdict.answers)
    found = []
    for column, quant in quants.items():
        won, of = counts[column, "preferred"], counts[column, "compared"]
        low, high = wilson(won, of) if of else (0.0, 1.0)
        found.append(
            Standing(
                column, quant, counts[column, "shown"], counts[column, "first"], of, won, expected.get(column, 0.0),
                low, high, counts[column, "ties"], counts[column, "none_good"], counts[column, "up"],
                counts[column, "down"], counts[column, "rewritten"],
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda one: (-one.preferred / max(one.compared, 1), one.down - one.up, one.quant)))


def position(verdicts: Iterable[Verdict]) -> Position:
    places: Counter[int] = Counter()
    expected = 0.0
    most = 0
    for verdict in verdicts:
        # What could be seen: a column that failed to answer took no place of a choice.
        answered = {judged.column for judged in verdict.answers}
        order = [column for column in verdict.order if column in answered]
        if len(order) < 2 or verdict.preferred not in order:
            continue
        places[order.index(verdict.preferred)] += 1
        expected += 1 / len(order)
        most = max(most, len(order))
    decided = sum(places.values())
    low, high = wilson(places[0], decided) if decided else (0.0, 1.0)
    return Position(decided, tuple(places[place] for place in range(most)), expected, low, high)


# -------------------------------------------------------------------------------------------------------- agreement


def agreement(verdicts: Iterable[Verdict]) -> Agreement:
    """Each person's newest verdict on a question counts, whatever talk it was given in."""
    units: dict[tuple[object, ...], dict[tuple[str, str], Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda each: each.time):
        said = bool(preferred(verdict)) or verdict.tie or verdict.none_good
        if verdict.source and said:
            columns = tuple(sorted(judged.column for judged in verdict.answers))
            unit = verdict.source, verdict.round, verdict.question, columns
            units.setdefault(unit, {})[reviews.person(verdict)] = verdict
    shared = [list(by_person.values()) for by_person in units.values() if len(by_person) > 1]
    labels = [[_label(verdict) for verdict in unit] for unit in shared]
    pairs = [pair for unit in labels for pair in combinations(unit, 2)]
    return Agreement(
        len(shared),
        sum(len({_words(verdict) for verdict in unit}) == 1 for unit in shared),
        len({reviews.person(verdict) for unit in shared for verdict in unit}),
        len(pairs),
        sum(a == b for a, b in pairs),
        alpha(labels) if len(shared) >= ENOUGH else None,
    )


def alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal data (Computing Krippendorff's Alpha-Reliability, 2011): 1 where all agree, 0
    where they agree as often as by chance. units: for each thing judged, one label a person; those with fewer than two
    say nothing. None where all labels are the same, or there are none."""
    usable = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[str] = Counter()
    for unit in usable:
        totals.update(unit)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum(
        (unit.total() ** 2 - sum(count * count for count in unit.values())) / (unit.total() - 1) for unit in usable
    )
    return 1 - (n - 1) * observed / expected


def _label(verdict: Verdict) -> str:
    """What was said, the same for the same: of quants with the same words one stands for all."""
    chosen = preferred(verdict)
    return min(chosen) if chosen else "(tie)" if verdict.tie else "(none good)"


def _words(verdict: Verdict) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((judged.column, judged.text) for judged in verdict.answers))


# ---------------------------------------------------------------------------------------------- answers, notes, people


def worst(verdicts: Iterable[Verdict], broken: Broken = lambda verdict, judged: ()) -> tuple[Bad, ...]:
    """The answers that somebody minded, worst first: most disliked on balance, then most often among answers none of
    which was good, then most rules broken, then the newest."""
    groups: dict[str, list[tuple[Verdict, Judged]]] = {}
    for verdict in verdicts:
        for judged in verdict.answers:
            turns = "\0".join(f"{turn.role}\0{turn.content}" for turn in judged.before)
            key = digest(f"{judged.column}\0{turns}\0\0{judged.text}".encode(errors="surrogatepass")).hex()
            groups.setdefault(key, []).append((verdict, judged))
    found = []
    for key, members in groups.items():
        verdict, judged = max(members, key=lambda member: (_minds(*member), member[0].time))
        bad = Bad(
            key,
            verdict,
            judged,
            tuple(each.reviewer for each, one in members if one.thumb < 0),
            tuple(each.reviewer for each, one in members if one.thumb > 0),
            tuple(each.reviewer for each, _ in members if each.none_good),
            broken(verdict, judged),
            tuple((each.reviewer, one.rewrite) for each, one in members if one.rewrite.strip()),
            tuple(_note(each, one) for each, one in members if one.note.strip()),
        )
        if bad.down or bad.none_good or bad.broken or bad.rewrites:
            found.append(bad)
    found.sort(key=lambda bad: bad.verdict.time, reverse=True)
    return tuple(sorted(found, key=_badness, reverse=True))


def _minds(verdict: Verdict, judged: Judged) -> bool:
    return judged.thumb < 0 or verdict.none_good or bool(judged.rewrite.strip())


def _badness(bad: Bad) -> tuple[int, ...]:
    return len(bad.down) - len(bad.up), len(bad.none_good), len(bad.rewrites), len(bad.broken)


def notes(verdicts: Iterable[Verdict], recommendations: Iterable[Recommendation] = ()) -> tuple[Note, ...]:
    """Everything that was written, the newest first."""
    found = [_note(verdict, one) for verdict in verdicts for one in verdict.answers if one.note.strip()]
    found += [
        Note(each.reviewer, each.time, _quant(each.column), "", "", each.note, "")
        for each in recommendations
        if each.note.strip()
    ]
    return tuple(sorted(reversed(found), key=lambda note: note.time, reverse=True))


def _note(verdict: Verdict, judged: Judged) -> Note:
    return Note(
        verdict.reviewer, verdict.time, judged.quant, verdict.question, judged.text, judged.note, verdict.id
    )  # fmt: skip


def _quant(column: str) -> str:
    return column.rpartition(":")[2]


def reviewers(verdicts: Iterable[Verdict], recommendations: Iterable[Recommendation] = ()) -> tuple[Reviewer, ...]:
    """Whoever judged or recommended, by name; who is the same person is reviews' to say."""
    given: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        given.setdefault(reviews.person(verdict), []).append(verdict)
    last_words = {reviews.person(each): each for each in recommendations}
    found = []
    for key in given.keys() | last_words.keys():
        theirs: Sequence[Verdict | Recommendation] = [*given.get(key, ()), *filter(None, [last_words.get(key)])]
        newest = max(theirs, key=lambda each: each.time)
        own = given.get(key, [])
        questions = {verdict.source for verdict in own if verdict.source}
        found.append(
            Reviewer(
                newest.reviewer,
                newest.role,
                len(own),
                dict(Counter(source.partition("/")[0] for source in sorted(questions))),
                sum(not verdict.source for verdict in own),
                newest.time,
                last_words.get(key),
            )
        )
    return tuple(sorted(found, key=lambda each: each.name.casefold()))


def _times(count: int) -> str:
    return {0: "not once", 1: "once", 2: "twice"}.get(count, f"{count} times")


# --------------------------------------------------------------------------------------------------------- from a home


def of_export(home: Home, export_id: str, among: Iterable[Run]) -> Judgement:
    """What was said of an export up to now. among: runs, of which the probe runs on this export tell which answers
    broke a rule. Raises NotFound for an id that no run can have."""
    rules: dict[Said, tuple[str, ...]] = {}
    for run in among:
        if (run.record.kind, run.record.parent) == ("probe", export_id):
            rules |= _broken(run)

    def broken(verdict: Verdict, judged: Judged) -> tuple[str, ...]:
        return rules.get((judged.quant, judged.before, judged.text.strip()), ())

    return of(reviews.verdicts(home, export_id), reviews.recommendations(home, export_id), broken)


def _broken(run: Run) -> dict[Said, tuple[str, ...]]:
    try:
        found = (run.out / probes.ANSWERS).stat()
        return _scored(run.out, found.st_mtime_ns, found.st_size)
    except (OSError, DataError):
        return {}  # what is wrong with a probe run is said where probe runs are shown


@functools.lru_cache(maxsize=_KEPT)
def _scored(out: Path, changed: int, size: int) -> dict[Said, tuple[str, ...]]:
    """Answers of a probe run that failed → the rules they broke. Rules are not held against an answer anew: one may
    take for ever, which only a run's own process can end."""
    return {
        (answer.model, answer.talk[:-1], answer.talk[-1].content.strip()): answer.score.reasons
        for answer in probes.answers(out)
        if answer.score.passed is False and answer.talk
    }
