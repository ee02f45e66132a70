"""What people think of an export's answers: verdicts and recommendations, each line as it was given. Owns their files;
what follows from them is judgement's and feedback's, approving an export is approval's, what is shown to whom is
blind's.

    KATHERINE_HOME/reviews/<export>/verdicts.jsonl  recommendations.jsonl    appended to, never changed
"""

import functools
import hashlib
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from katherine import runs, talks
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.settings import Home
from katherine.talks import Talk

_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]*")
# In characters. A name has to fit a line of a table, a note is a paragraph or five, a rewrite may be longer than the
# longest answer: 400 tokens are some 1,600 characters.
LONGEST_NAME = 60
LONGEST_NOTE = 2_000
LONGEST_REWRITE = 8_000
# Files that were read are kept by size and time of change: a page looks at one or two exports.
_KEPT = 8


class Judged(msgspec.Struct, frozen=True):
    """One answer and what was thought of it. column, quant, sha256: which file gave it. before: all that this column
    had been told, ending with the question. thumb: -1, 0 (none) or 1. rewrite: what to say instead, "" for none."""

    column: str
    quant: str
    sha256: str
    before: tuple[Message, ...]
    text: str
    thumb: int = 0
    note: str = ""
    rewrite: str = ""

    @property
    def says_something(self) -> bool:
        return bool(self.thumb or self.note or self.rewrite)


class Verdict(msgspec.Struct, frozen=True):
    """One person's view of one question. order: the columns as they were shown, first to last. preferred: a column, or
    "" where none was chosen. tie: they were said to be equally good. none_good: none of them was. At most one of the
    three. The last of a reviewer, talk and round counts; one that says nothing takes back what was said."""

    id: str
    time: str
    reviewer: str
    role: str
    export: str
    talk: str
    round: int
    source: str
    question: str
    order: tuple[str, ...]
    answers: tuple[Judged, ...]
    preferred: str = ""
    tie: bool = False
    none_good: bool = False

    @property
    def says_something(self) -> bool:
        chosen = bool(self.preferred or self.tie or self.none_good)
        return chosen or any(answer.says_something for answer in self.answers)


class Recommendation(msgspec.Struct, frozen=True):
    """One person's last word on an export. good: whether it may go out. column: the one they would take, or "" for no
    preference. judged: verdicts of theirs at that time. favourite: they asked for the one that they had chosen most
    often, without being told which or whether there was one; where none stood out, column is "". The last of a reviewer
    counts."""

    id: str
    time: str
    reviewer: str
    role: str
    export: str
    good: bool
    column: str = ""
    note: str = ""
    judged: int = 0
    favourite: bool = False


class Mark(msgspec.Struct, frozen=True):
    """What somebody says of one answer, as in Judged."""

    thumb: int = 0
    note: str = ""
    rewrite: str = ""


class Person(Protocol):
    """Whatever says whose it is."""

    @property
    def reviewer(self) -> str: ...
    @property
    def role(self) -> str: ...


_Line = TypeVar("_Line", Verdict, Recommendation)


# ----------------------------------------------------------------------------------------------------------- writing


def judge(
    home: Home,
    talk: Talk,
    *,
    round: int,
    reviewer: str,
    role: str,
    marks: Mapping[str, Mark],
    preferred: str = "",
    tie: bool = False,
    none_good: bool = False,
) -> Verdict:
    """A verdict on one round of a talk, made and recorded. marks: column → what is said of its answer; all answers go
    into the verdict, marked or not. Raises DataError and NotFound as `record` does."""
    if not 0 <= round < len(talk.rounds):
        raise NotFound(f"Talk {talk.id} has no question {round + 1}: it has {len(talk.rounds)}.")
    if unknown := [column for column in marks if column not in talk.columns]:
        raise DataError(f"{unknown[0]!r} did not answer in talk {talk.id}.")
    asked = talk.rounds[round]
    answers = []
    for answer in asked.answers:
        # Without a word there is nothing to judge.
        if not answer.text:
            continue
        mark = marks.get(answer.column, Mark())
        before = (*talks.heard(talk, answer.column, round), Message("user", asked.question))
        quant = answer.column.rpartition(":")[2]
        judged = Judged(
            answer.column, quant, talk.files[answer.column], before, answer.text, mark.thumb, mark.note, mark.rewrite
        )
        answers.append(judged)
    verdict = Verdict(
        secrets.token_hex(8), runs.now(), name(reviewer), role, talk.export, talk.id, round, talk.source,
        asked.question, talk.columns, tuple(answers), preferred, tie, none_good,
    )  # fmt: skip
    record(home, verdict)
    return verdict


def record(home: Home, verdict: Verdict) -> None:
    """Append it, on the disk when this returns. Raises NotFound where export or talk are not there, DataError where it
    does not fit the talk, or a text is too long."""
    _check_export(home, verdict.export)
    talk = talks.load(home, verdict.talk)
    if talk.export != verdict.export or not 0 <= verdict.round < len(talk.rounds):
        raise DataError(f"Talk {talk.id} has no question {verdict.round + 1} about export {verdict.export}.")
    if verdict.question != talk.rounds[verdict.round].question or verdict.source != talk.source:
        raise DataError(f"Question {verdict.round + 1} of talk {talk.id} is another one.")
    if sorted(verdict.order) != sorted(talk.columns):
        raise DataError(f"Talk {talk.id} was held with {', '.join(talk.columns)}, not {', '.join(verdict.order)}.")
    said = {answer.column: answer.text for answer in talk.rounds[verdict.round].answers}
    seen: set[str] = set()
    for answer in verdict.answers:
        if answer.column in seen or answer.column not in talk.files:
            raise DataError(f"{answer.column!r} did not answer in talk {talk.id}, or stands there twice.")
        if not answer.column.startswith(f"{verdict.export}:"):
            raise DataError(f"{answer.column!r} is not of export {verdict.export}.")
        if answer.sha256 != talk.files[answer.column]:
            raise DataError(f"{answer.column!r} is another file than the one that answered in talk {talk.id}.")
        if answer.text != said.get(answer.column):
            raise DataError("This answer has changed since: look at it again.")
        if answer.thumb not in (-1, 0, 1):
            raise DataError(f"A thumb is -1, 0 or 1, not {answer.thumb}.")
        _check_length("The note", answer.note, LONGEST_NOTE)
        _check_length("The rewritten answer", answer.rewrite, LONGEST_REWRITE)
        seen.add(answer.column)
    if verdict.preferred and verdict.preferred not in seen:
        raise DataError(f"{verdict.preferred!r} gave no answer in talk {talk.id}, so it cannot be the better one.")
    if bool(verdict.preferred) + verdict.tie + verdict.none_good > 1:
        raise DataError("Either one is better, or they are the same, or none is good.")
    _check_who(verdict.reviewer, verdict.role)
    _append(_folder(home, verdict.export) / "verdicts.jsonl", verdict)


def recommend(home: Home, recommendation: Recommendation) -> None:
    """Append it, on the disk when this returns. Raises NotFound for the export, DataError for a column of another one
    or a note that is too long."""
    _check_export(home, recommendation.export)
    if recommendation.column and not recommendation.column.startswith(f"{recommendation.export}:"):
        raise DataError(f"{recommendation.column!r} is not of export {recommendation.export}.")
    _check_length("The note", recommendation.note, LONGEST_NOTE)
    _check_who(recommendation.reviewer, recommendation.role)
    _append(_folder(home, recommendation.export) / "recommendations.jsonl", recommendation)


def name(text: str) -> str:
    """A person's name as it is kept: on one line, without characters that cannot be seen. Raises DataError where
    nothing is left of it, or it is too long."""
    seen = "".join(letter if letter.isprintable() else " " for letter in unicodedata.normalize("NFC", text))
    found = " ".join(seen.split())
    if not found:
        raise DataError("Please give your name: it stands beside what you say.")
    _check_length("The name", found, LONGEST_NAME)
    return found


def _check_export(home: Home, export_id: str) -> None:
    if runs.load(home, export_id).record.kind != "export":
        raise NotFound(f"Run {export_id} is not an export.")


def _check_who(reviewer: str, role: str) -> None:
    if name(reviewer) != reviewer:
        raise DataError(f"{reviewer!r} is not a name on one line, without spaces around it.")
    if role not in ("operator", "reviewer"):
        raise DataError(f"{role!r} is not a role.")


def _check_length(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise DataError(f"{what} is too long: {len(text):,} characters, and at most {most:,} can be kept.")


def _append(path: Path, line: Verdict | Recommendation) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        whole = msgspec.json.encode(line) + b"\n"
        # After a torn line, which a machine left that died while it wrote, this one would be lost as well.
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":
            whole = b"\n" + whole
        # One write: two processes that append at once do not mix their lines.
        if os.write(file, whole) != len(whole):
            raise OSError(f"{path} took only a part of the line: is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ----------------------------------------------------------------------------------------------------------- reading


def verdicts(home: Home, export_id: str) -> list[Verdict]:
    """The last of each person, talk and round, oldest first; what was taken back is left out."""
    found = _last(
        _lines(_folder(home, export_id) / "verdicts.jsonl", Verdict),
        lambda each: (*person(each), each.talk, each.round),
    )
    return [verdict for verdict in found if verdict.says_something]


def recommendations(home: Home, export_id: str) -> list[Recommendation]:
    """The last of each person, oldest first."""
    lines = _lines(_folder(home, export_id) / "recommendations.jsonl", Recommendation)
    return _last(lines, person)


def said(home: Home, export_id: str, who: Person) -> int:
    """How many lines this person has written about the export, those that count no more among them."""
    folder, me = _folder(home, export_id), person(who)
    verdicts = _lines(folder / "verdicts.jsonl", Verdict)
    words = _lines(folder / "recommendations.jsonl", Recommendation)
    return sum(person(each) == me for each in verdicts) + sum(person(each) == me for each in words)


def fingerprint(home: Home, export_id: str) -> str:
    """sha256 over all that was ever said of the export, "" where nobody judged."""
    folder = _folder(home, export_id)
    parts = []
    for file in ("verdicts.jsonl", "recommendations.jsonl"):
        try:
            parts.append(hashlib.sha256((folder / file).read_bytes()).digest())
        except FileNotFoundError:
            parts.append(b"")
    return hashlib.sha256(b"\0".join(parts)).hexdigest() if any(parts) else ""


def person(given: Person) -> tuple[str, str]:
    """Who said it: a name is the same whatever the case of its letters, but not in another role, since anybody can type
    an operator's name."""
    return given.reviewer.casefold(), given.role


def favourite(given: Iterable[Verdict]) -> str:
    """The column that was preferred most often, "" where two were equally often or none ever."""
    counts: dict[str, int] = {}
    for verdict in given:
        if verdict.preferred:
            counts[verdict.preferred] = counts.get(verdict.preferred, 0) + 1
    most = [column for column, count in counts.items() if count == max(counts.values())]
    return most[0] if len(most) == 1 else ""


def _last(lines: Iterable[_Line], key: Callable[[_Line], object]) -> list[_Line]:
    found: dict[object, _Line] = {}
    for line in lines:
        place = key(line)
        found.pop(place, None)
        found[place] = line
    return list(found.values())


def _lines(path: Path, kind: type[_Line]) -> tuple[_Line, ...]:
    """Every whole line. A torn one is left out: whoever said it was never told that it was kept."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return _read(path, kind, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=_KEPT)
def _read(path: Path, kind: type[_Line], size: int, changed: int) -> tuple[_Line, ...]:
    decode = msgspec.json.Decoder(kind).decode
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found.append(decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return tuple(found)


def _folder(home: Home, export_id: str) -> Path:
    """Raises NotFound for an id that no run can have: it may come from anywhere."""
    if not _ID.fullmatch(export_id):
        raise NotFound(f"{export_id!r} is not a run's id.")
    return home.root / "reviews" / export_id
