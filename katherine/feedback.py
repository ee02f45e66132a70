"""From verdicts to training data: what people said of two answers to the same conversation becomes a preference pair
that carries where it came from. Owns which pairs there are and what was decided about them; making a dataset of them is
corpus's, as an errand.

    KATHERINE_HOME/feedback/decisions.json         left out, put in or reworded, by a pair's id; replaced whole
    KATHERINE_HOME/feedback/feedback-<hash>.jsonl  pairs on their way into a dataset, which keeps a copy in its raw/
"""

import functools
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from katherine import findings, lines, reviews, runs, shelf, talks
from katherine.errors import DataError, KatherineError, NotFound
from katherine.examples import Message, Preference
from katherine.intake import digest
from katherine.recipe import SftRecipe
from katherine.reviews import Judged, Verdict
from katherine.settings import Home
from katherine.turns import turn

# The curator's tags that the pairs carry: somebody looked at each.
CATEGORY = "review"
_FILE = re.compile(r"feedback-[0-9a-f]{12}\.jsonl")
_ENDING = "-reviewed"
_encode = msgspec.json.Encoder().encode
# Datasets whose feedback files are remembered; they do not change.
_KEPT = 256
# Talks of which it is remembered whether answers were cut; a reviewer holds some thirty.
_TALKS = 4096

# rewrite: the reviewer wrote what to say instead. disliked: one was preferred, the other disliked. liked: none was
# preferred, but one was liked and the other disliked. preferred: one was preferred, and nothing said against the other.
How = Literal["rewrite", "disliked", "liked", "preferred"]

_DIFFERENT = "the quants had said different things before, so these are not two answers to the same conversation"
_SYSTEM = "asked under a system prompt, which training never has"
_PREFERRED_DISLIKED = "preferred, but disliked as well"
_ALSO_LIKED = "not the preferred one, but liked as well"
_ONLY_OTHERS = "neither preferred nor disliked, while others were disliked"
_TIE = "said to be as good as the others"
_REWRITE_LIKED = "rewritten, but liked as it is"
_CUT = "preferred or liked, but cut off at the longest answer: to learn it would be to learn to stop there"
_SAME = "the same words as the better answer"


class Origin(msgspec.Struct, frozen=True):
    """Where a pair came from: one verdict. chosen, rejected: the quants that said so, chosen "" for a rewrite. note:
    what the reviewer wrote about the rejected answer."""

    export: str
    verdict: str
    reviewer: str
    role: str
    time: str
    talk: str
    round: int
    source: str
    how: How
    chosen: str
    rejected: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair that could go into a dataset. id: content hash of the pair as it was given. pair: as it would go in.
    given: the better answer before somebody reworded it here, "" where nobody did. origins: every verdict that says so,
    oldest first. opposed: id of a candidate that says the opposite, or "". datasets: that have it already. included:
    whether it goes in: as was decided, else unless it is opposed, or in the dataset that is to be extended."""

    id: str
    pair: Preference
    origins: tuple[Origin, ...]
    given: str = ""
    opposed: str = ""
    datasets: tuple[str, ...] = ()
    included: bool = True

    @property
    def chosen(self) -> str:
        return self.pair.chosen[0].content

    @property
    def rejected(self) -> str:
        return self.pair.rejected[0].content

    @property
    def question(self) -> str:
        return self.pair.prompt[-1].content

    @property
    def how(self) -> How:
        """The strongest of its origins'."""
        order: tuple[How, ...] = ("rewrite", "disliked", "liked", "preferred")
        return min((origin.how for origin in self.origins), key=order.index)

    @property
    def people(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(origin.reviewer for origin in self.origins))


@dataclass(frozen=True, slots=True)
class Collected:
    """left_out: why answers that somebody judged gave no pair → how many."""

    pairs: tuple[Candidate, ...]
    left_out: dict[str, int]


class Decision(msgspec.Struct, frozen=True):
    """included: None where nobody decided. chosen: other words for the better answer, "" for those given."""

    included: bool | None = None
    chosen: str = ""


# ------------------------------------------------------------------------------------------------- verdicts → pairs


def collect(
    verdicts: Iterable[Verdict], is_cut: Callable[[Verdict, Judged], bool] = lambda verdict, judged: False
) -> Collected:
    """The pairs that follow from verdicts, the newest first, nothing decided yet.

    A preferred answer is chosen over each one that was disliked; where none was, over each that was not liked. Where
    none was preferred, a liked answer is chosen over a disliked one. A rewrite is chosen over the answer that it
    replaces. Only answers to the same conversation make a pair; a tie makes none. is_cut: whether an answer did not end
    by itself; such a one is never chosen.
    """
    found: dict[str, Candidate] = {}
    left: Counter[str] = Counter()
    for verdict in sorted(verdicts, key=lambda each: each.time):
        for before, chosen, rejected, origin in _said(verdict, left, is_cut):
            try:
                pair = _pair(before, chosen, rejected)
            except lines.Rejected as wrong:
                left[str(wrong)] += 1
                continue
            pair_id = digest(_encode(pair)).hex()
            known = found.get(pair_id)
            origins = (*known.origins, origin) if known else (origin,)
            found[pair_id] = Candidate(pair_id, pair, origins)
    tagged = [replace(one, pair=_tagged(one.pair, one.how)) for one in found.values()]
    tagged.sort(key=lambda one: (one.origins[-1].time, one.id), reverse=True)
    return Collected(tuple(tagged), dict(left.most_common()))


def _said(
    verdict: Verdict, left: Counter[str], is_cut: Callable[[Verdict, Judged], bool]
) -> Iterator[tuple[tuple[Message, ...], str, str, Origin]]:
    """(conversation, better, worse, origin) for all that the verdict says, before any look at the texts."""
    if any(turn.role == "system" for judged in verdict.answers for turn in judged.before):
        left[_SYSTEM] += sum(judged.says_something for judged in verdict.answers) or bool(verdict.preferred)
        return
    for judged in verdict.answers:
        if judged.rewrite.strip():
            if judged.thumb > 0:
                left[_REWRITE_LIKED] += 1
            else:
                yield judged.before, judged.rewrite, judged.text, _origin(verdict, "rewrite", "", judged)
    if verdict.tie:
        left[_TIE] += len(verdict.answers)
        return
    for better, worse, how in _preferences(verdict, left):
        if better.before != worse.before:
            left[_DIFFERENT] += 1
        elif better.text.strip() == worse.text.strip():
            left[_SAME] += 1
        elif is_cut(verdict, better):
            left[_CUT] += 1
        else:
            yield better.before, better.text, worse.text, _origin(verdict, how, better.quant, worse)


def _preferences(verdict: Verdict, left: Counter[str]) -> Iterator[tuple[Judged, Judged, How]]:
    answers = verdict.answers
    disliked = [judged for judged in answers if judged.thumb < 0]
    best = next((judged for judged in answers if judged.column == verdict.preferred), None)
    if best is None:
        yield from ((a, b, "liked") for a in answers if a.thumb > 0 for b in disliked)
        return
    if best.thumb < 0:
        left[_PREFERRED_DISLIKED] += 1
        return
    for other in answers:
        if other is best:
            continue
        if other.thumb < 0:
            yield best, other, "disliked"
        elif other.thumb > 0:
            left[_ALSO_LIKED] += 1
        elif disliked:
            left[_ONLY_OTHERS] += 1
        else:
            yield best, other, "preferred"


def _origin(verdict: Verdict, how: How, chosen: str, rejected: Judged) -> Origin:
    return Origin(
        verdict.export, verdict.id, verdict.reviewer, verdict.role, verdict.time, verdict.talk, verdict.round,
        verdict.source, how, chosen, rejected.quant, rejected.note,
    )  # fmt: skip


def _pair(before: Iterable[Message], chosen: str, rejected: str) -> Preference:
    """By the reader of dataset files, so that nothing passes here that would not pass there. Raises lines.Rejected."""
    line = {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in before],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    pair, _ = lines.read(json.dumps(line).encode())
    assert isinstance(pair, Preference)
    return pair


def _tagged(pair: Preference, how: How) -> Preference:
    kind = "rewrite" if how == "rewrite" else "preference"
    return Preference(pair.prompt, pair.chosen, pair.rejected, CATEGORY, kind)


# ------------------------------------------------------------------------------------------------- what was decided


def survey(home: Home, export_ids: Iterable[str], onto: str = "") -> Collected:
    """The candidates of these exports' verdicts, the newest first, with what was decided about them, and what gave
    none. onto: the dataset that is to be extended; what it has already does not go in unless somebody says so. Raises
    NotFound for an id that is no run's, DataError for damaged decisions."""
    given = (verdict for each in dict.fromkeys(export_ids) for verdict in reviews.verdicts(home, each))
    collected = collect(given, lambda verdict, judged: judged.column in _cut_in(home, verdict))
    decided, there = decisions(home), _used(home)
    found = []
    for one in collected.pairs:
        decision = decided.get(one.id, Decision())
        one = replace(one, datasets=tuple(there.get(one.id, ())))
        if decision.chosen:
            reworded = _tagged(_pair(one.pair.prompt, decision.chosen, one.rejected), one.how)
            one = replace(one, pair=reworded, given=one.chosen)
        found.append(one)
    swapped = findings.contradictions([_sides(one.pair) for one in found]).swapped
    for row, one in enumerate(found):
        opposed = found[swapped[row]].id if row in swapped else ""
        included = decided.get(one.id, Decision()).included
        if included is None:
            included = not opposed and onto not in one.datasets
        found[row] = replace(one, opposed=opposed, included=included)
    return Collected(tuple(found), collected.left_out)


def _cut_in(home: Home, verdict: Verdict) -> frozenset[str]:
    """The columns whose answers in a verdict's round were cut; a talk that is gone tells nothing."""
    try:
        return _cut(home, verdict.talk, verdict.round, *talks.stamp(home, verdict.talk))
    except NotFound:
        return frozenset()


@functools.lru_cache(maxsize=_TALKS)
def _cut(home: Home, talk_id: str, number: int, changed: int, size: int) -> frozenset[str]:
    """changed, size: of the talk's file, since a round that is asked again is replaced. Beside a stopped answer the
    others were shown no further than it: the rest of them nobody judged."""
    try:
        asked = talks.load(home, talk_id).rounds[number]
    except (KatherineError, IndexError):
        return frozenset()
    shown = asked.stopped_at
    return frozenset(
        answer.column
        for answer in asked.answers
        if answer.finish == "length" or answer.state == "stopped" or (shown is not None and len(answer.text) > shown)
    )


def _sides(pair: Preference) -> tuple[bytes, bytes]:
    return digest(_encode((pair.prompt, pair.chosen))), digest(_encode((pair.prompt, pair.rejected)))


def decisions(home: Home) -> dict[str, Decision]:
    """By a candidate's id. Raises DataError where the file is damaged."""
    path = _folder(home) / "decisions.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Decision])
    except FileNotFoundError:
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it, and decide again.") from error


def include(home: Home, ids: Collection[str], included: bool) -> None:
    """Whether these candidates go into the next dataset; it stays so until it is said otherwise."""
    _decide(home, {each: {"included": included} for each in ids})


def reword(home: Home, candidate: Candidate, text: str) -> None:
    """Other words for the better answer; those that were given where `text` is empty or the same. Raises DataError for
    words that could not be learned."""
    given, text = candidate.given or candidate.chosen, text.strip()
    if text in ("", given):
        _decide(home, {candidate.id: {"chosen": ""}})
        return
    if len(text) > reviews.LONGEST_REWRITE:
        raise DataError(f"The answer has {len(text):,} characters; at most {reviews.LONGEST_REWRITE:,} can be kept.")
    pair = _pair(candidate.pair.prompt, text, candidate.rejected)
    _decide(home, {candidate.id: {"chosen": pair.chosen[0].content}})


def _decide(home: Home, changes: dict[str, dict[str, Any]]) -> None:
    with turn(home, "feedback", "the choice of pairs"):
        decided = decisions(home)
        for each, change in changes.items():
            decided[each] = msgspec.structs.replace(decided.get(each, Decision()), **change)
        _folder(home).mkdir(parents=True, exist_ok=True)
        runs.write_json(_folder(home) / "decisions.json", msgspec.to_builtins(decided))


def _used(home: Home) -> dict[str, list[str]]:
    """Candidate → the datasets that were made with it."""
    found: dict[str, list[str]] = {}
    for one in shelf.everyone(home):
        for entry in one.report["by_file"]:
            if _FILE.fullmatch(entry["file"]) and not entry.get("left_out"):
                for each in _ids(one.path, entry["raw"], entry["file"]):
                    found.setdefault(each, []).append(one.id)
    return found


@functools.lru_cache(maxsize=_KEPT)
def _ids(dataset: Path, raw: str, label: str) -> frozenset[str]:
    """The candidates in a dataset's copy of a file of ours, without those that were rejected there."""
    refused = set()
    found = []
    try:
        for line in (dataset / "rejects.jsonl").read_bytes().split(b"\n"):
            if line and (entry := json.loads(line))["file"] == label:
                refused.add(entry["line"])
        for number, line in enumerate((dataset / "raw" / raw).read_bytes().split(b"\n"), 1):
            if line and number not in refused:
                found.append(str(json.loads(line)["_id"]))
    except (OSError, ValueError, LookupError, TypeError):
        return frozenset()  # somebody else's file by such a name
    return frozenset(found)


# ------------------------------------------------------------------------------------------------ into a new dataset


def write(home: Home, chosen: Sequence[Candidate]) -> Path:
    """The chosen pairs as a file that corpus reads, each line with where it came from under keys of its own. The same
    choice gives the same file. Raises DataError where nothing is chosen, or two say the opposite."""
    if not chosen:
        raise DataError("No pair is chosen, so there is nothing to add.")
    ids = {one.id for one in chosen}
    for one in chosen:
        if one.opposed in ids:
            raise DataError(
                f"Pairs {one.id[:8]} and {one.opposed[:8]} (about “{one.question[:60]}”) say the opposite of each "
                "other, and both would be lost: leave out one of them."
            )
    content = b"".join(_line(one) + b"\n" for one in sorted(chosen, key=lambda one: one.id))
    path = _folder(home) / f"feedback-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with draft.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    return path


def _line(one: Candidate) -> bytes:
    """Keys that begin with an underscore are notes to oneself: a dataset's reader passes them over, and its raw/ keeps
    them."""
    notes: dict[str, Any] = {"_id": one.id, "_from": one.origins}
    if one.given:
        notes["_given"] = one.given
    return _encode(msgspec.to_builtins(one.pair) | notes)


def own_dataset(home: Home, export_id: str) -> str:
    """The dataset that the export's model learned from, "" where that is gone. Raises NotFound for the export."""
    dataset = runs.load(home, export_id).record.dataset
    try:
        return shelf.summary(home, dataset).id if dataset else ""
    except KatherineError:
        return ""


def next_name(home: Home, dataset_id: str) -> str:
    """What a dataset made of this one and pairs is called unless somebody says otherwise. Raises NotFound."""
    summary = shelf.summary(home, dataset_id)
    stem = summary.id.rpartition(f"-{summary.fingerprint[:8]}")[0] or summary.id
    return stem.removesuffix(_ENDING)[: 64 - len(_ENDING)] + _ENDING


def request(home: Home, dataset_id: str, file: Path, name: str = "") -> dict[str, Any]:
    """What the errand "prepare" is asked, so that the dataset's files and choices are taken as they are and the file is
    added to them. Raises NotFound for the dataset, DataError where it has exactly these pairs already."""
    report = shelf.summary(home, dataset_id).report
    options = report["options"]
    left_out = list(options.get("left_out", ()))
    has_it = any(entry["file"] == file.name for entry in report["by_file"])
    if has_it and file.name not in left_out:
        raise DataError(f"Dataset {dataset_id} was made with exactly these pairs. Choose others, or another dataset.")
    return {
        "dataset": dataset_id,
        "also": [] if has_it else [str(file)],
        "leave_out": [label for label in left_out if label != file.name],
        "include_uncurated": options["include_uncurated"],
        "base": options["base"] or SftRecipe.model_fields["base"].default,
        "max_length": options["max_length"],
        "name": name.strip() or next_name(home, dataset_id),
    }


def came_of(home: Home, dataset_id: str, label: str) -> str:
    """What became of a file's pairs in a dataset, in words. Raises NotFound for the dataset."""
    report = shelf.summary(home, dataset_id).report
    entry = next((entry for entry in report["by_file"] if entry["file"] == label), None)
    if entry is None:
        return ""
    said = f"{_count(entry['dpo'], 'pair')} added"
    if entry["duplicates"]:
        said += f", {entry['duplicates']} already there"
    if entry["rejected"]:
        said += f", {entry['rejected']} left out (see the dataset's problems)"
    return f"{said}; {_count(report['dpo']['used'], 'pair')} and {_count(report['sft']['unique'], 'example')} in all"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _folder(home: Home) -> Path:
    return home.root / "feedback"
