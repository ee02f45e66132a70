"""What a reviewer is shown, and which file is behind it: a person's sitting with one export, its questions, the talks
that answer them, and the letters under which the answers stand. Nothing that a page is given tells the files apart.
Who answers is jobs.sittings' affair, what is said of the answers reviews'.

    KATHERINE_HOME/reviews/<export>/sessions/<id>.json    replaced whole
"""

import hashlib
import hmac
import random
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from katherine import columns, gguf, probes, probesets, reviews, runs, talks
from katherine.errors import DataError, KatherineError, NotFound, ReviewError
from katherine.history import Seen
from katherine.reviews import Mark, Verdict
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.talks import OVER, Round, Sampling, Talk

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The name of the course without a set of questions.
FREE = ""
_ID = re.compile(r"[0-9a-f]{32}")
# Of one export in one role: many times the people who ever review one, and all their files are read when one begins.
MOST_SESSIONS = 500
# Lines of one person about one export: twenty taps on each of 250 questions. Each holds all answers to its question,
# some 5 kB, and all lines are read to show what was said.
MOST_LINES = 5_000
# One process serves the pages; in it, two devices of one person may change a session at once.
_changing = threading.RLock()


class Question(msgspec.Struct, frozen=True):
    """One of a set, as the set was when the reviewer began it. turns: asked one after another, the last answer is
    judged. for_person: no rule decides whether an answer is right."""

    probe: str
    turns: tuple[str, ...]
    for_person: bool = False


class Course(msgspec.Struct, frozen=True):
    """A set of questions, or free talks one after another (no questions). at: the place in it where the reviewer is.
    talks: place → the talk that answers it."""

    questions: tuple[Question, ...] = ()
    at: int = 0
    talks: dict[int, str] = {}


class Session(msgspec.Struct, frozen=True):
    """One person's review of one export. seed: what the orders and the samplings are drawn from; it never leaves the
    server. courses: by the name of the probe set, FREE for free talks."""

    id: str
    created: str
    reviewer: str
    role: str
    export: str
    seed: str
    courses: dict[str, Course] = {}


@dataclass(frozen=True, slots=True)
class Version:
    """An export as a reviewer sees it. key: what a page calls it. made: ISO 8601. files: column → sha256."""

    key: str
    export: str
    made: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Face:
    """One answer without who gave it. state: "coming" until all answers to the question are there, then what became of
    this one: "done", "cut" (it was still going on when it was ended), "stopped" (nobody waited for it), "silent" (it
    failed)."""

    letter: str
    text: str
    state: Literal["coming", "done", "cut", "stopped", "silent"]
    mark: Mark = field(default_factory=Mark)


# ---------------------------------------------------------------------------------------------------------- versions


def versions(home: Home, among: Sequence[Seen]) -> list[Version]:
    """The exports that can be reviewed, in the order given: finished, with accepted quants that are still there."""
    found = []
    for seen in among:
        if seen.kind != "export" or seen.status.state is not State.succeeded:
            continue
        if files := _files(home, seen.run):
            key = hashlib.sha256(f"version\0{seen.id}".encode()).hexdigest()[:16]
            found.append(Version(key, seen.id, seen.run.record.created, files))
    return found


def version(home: Home, among: Sequence[Seen], key: str) -> Version:
    """By what a page calls it. Raises ReviewError."""
    for found in versions(home, among):
        if found.key == key:
            return found
    raise ReviewError("This version is not there any more. Go back to the beginning, and choose another.")


def files(home: Home, session: Session) -> dict[str, str]:
    """Column → sha256 of what the session reviews. Raises ReviewError where nothing of it is there any more."""
    try:
        found = _files(home, runs.load(home, session.export))
    except (NotFound, DataError):
        found = {}
    if not found:
        raise ReviewError("This version is not there any more. Go back to the beginning, and choose another.")
    return found


def _files(home: Home, run: Run) -> dict[str, str]:
    """Without the unquantised file: it is not what goes out."""
    return {each.id: each.sha256 for each in columns.of_export(home, run) if each.quant != gguf.UNQUANTISED}


# ---------------------------------------------------------------------------------------------------------- sessions


def begin(home: Home, export_id: str, reviewer: str, role: str) -> Session:
    """The person's session with this export; the one that they left, on whatever device, is taken up again. Raises
    ReviewError for a name that is none, or where too many people have begun."""
    try:
        name = reviews.name(reviewer)
    except DataError as error:
        raise ReviewError(str(error)) from None
    # 128 bits: nobody finds it by trying.
    session = Session(secrets.token_hex(16), runs.now(), name, role, export_id, secrets.token_hex(16))
    with _changing:
        there = sessions(home, export_id)
        for known in there:
            if reviews.person(known) == reviews.person(session):
                return known
        if sum(known.role == role for known in there) >= MOST_SESSIONS:
            raise ReviewError(
                f"{MOST_SESSIONS} people have begun with this version, and no more can. Please tell whoever asked you."
            )
        _save(home, session)
    return session


def load(home: Home, session_id: str, role: str) -> Session:
    """Raises ReviewError for an id that is not a session's of this role: nothing else of a home can be named so."""
    found = list((home.root / "reviews").glob(f"*/sessions/{session_id}.json")) if _ID.fullmatch(session_id) else []
    session = _read(found[0]) if len(found) == 1 else None
    if session is None or session.role != role:
        raise ReviewError("Your place was not found. Please start again from the beginning, under the same name.")
    return session


def sessions(home: Home, export_id: str) -> list[Session]:
    """All that were begun with the export, oldest first; a damaged file is left out."""
    found = [_read(path) for path in _folder(home, export_id).glob("*.json")]
    return sorted((each for each in found if each is not None), key=lambda each: (each.created, each.id))


def _read(path: Path) -> Session | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Session)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _save(home: Home, session: Session) -> None:
    path = _folder(home, session.export) / f"{session.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, msgspec.to_builtins(session))


def _folder(home: Home, export_id: str) -> Path:
    return home.root / "reviews" / export_id / "sessions"


@contextmanager
def _changed(home: Home, session: Session) -> Iterator[Session]:
    """The session as it is on disk now, while nobody else changes it."""
    with _changing:
        yield load(home, session.id, session.role)


# ----------------------------------------------------------------------------------------------------------- courses


@dataclass(frozen=True, slots=True)
class Offer:
    """A set of questions as it is offered. judged: how many of them this person has said something about."""

    name: str
    description: str
    questions: int
    judged: int
    is_begun: bool


def offers(home: Home, session: Session) -> list[Offer]:
    """The sets that can be answered; one that has been begun stays, whatever became of its file."""
    said = {each.talk for each in mine(home, session)}
    found = []
    for name in dict.fromkeys((*probesets.names(home), *(name for name in session.courses if name != FREE))):
        course = session.courses.get(name)
        description, count = "", 0
        try:
            chosen = probesets.load(home, name)
            description, count = chosen.description, len(chosen.probe)
        except KatherineError:
            if course is None:
                continue
        judged = len(said & set(course.talks.values())) if course else 0
        found.append(
            Offer(name, description, len(course.questions) if course else count, judged, bool(course and course.talks))
        )
    return found


def enter(home: Home, session: Session, name: str) -> Session:
    """With the course of that name in it. Its questions are the set's of this moment: a set that is changed meanwhile
    changes nobody's review. Raises ReviewError."""
    with _changed(home, session) as now:
        if name in now.courses:
            return now
        course = Course()
        if name != FREE:
            try:
                # A name comes from a page; `load` would take a path as well.
                if name not in probesets.names(home):
                    raise NotFound(name)
                asked = probesets.load(home, name).probe
            except KatherineError:
                raise ReviewError("These questions are not there any more. Choose others.") from None
            course = Course(tuple(Question(each.id, each.questions, not each.has_rule) for each in asked))
        return _with(home, now, name, course)


def move(home: Home, session: Session, name: str, at: int) -> Session:
    """To a place of a course: a question's, or for free talks one of those begun, or the next new one. Raises
    ReviewError for a place that there is not."""
    with _changed(home, session) as now:
        return _with(home, now, name, msgspec.structs.replace(course_at(now, name, at), at=at))


def course_of(session: Session, name: str) -> Course:
    """Raises ReviewError for one that was not entered."""
    if name not in session.courses:
        raise ReviewError("Choose first what you would like to do.")
    return session.courses[name]


def course_at(session: Session, name: str, at: int) -> Course:
    """The course, which has that place. Raises ReviewError where it was not entered, or has not."""
    course = course_of(session, name)
    places = len(course.questions) if name != FREE else len(course.talks) + 1
    if not 0 <= at < places:
        raise ReviewError("There is no such question here.")
    return course


def _with(home: Home, session: Session, name: str, course: Course) -> Session:
    changed = msgspec.structs.replace(session, courses=session.courses | {name: course})
    _save(home, changed)
    return changed


# ------------------------------------------------------------------------------------------------------------- talks


def talk_of(home: Home, session: Session, name: str, at: int) -> Talk | None:
    """What answers that place, None before anything does. Raises ReviewError for a place that there is not."""
    talk_id = course_at(session, name, at).talks.get(at)
    if talk_id is None:
        return None
    try:
        return talks.load(home, talk_id)
    except (NotFound, DataError):
        return None  # removed meanwhile: the place can be answered anew


def open_talk(home: Home, session: Session, name: str, at: int) -> Talk:
    """A new talk for that place, with the files in an order drawn for it; nothing is asked yet. Each column is asked in
    that order as well, so that who begins first says nothing. Raises ReviewError where no file is there any more, or
    for a place that there is not."""
    with _changed(home, session) as now:
        drawn, found = _drawn(now, name, at), files(home, now)
        order = sorted(found)
        drawn.shuffle(order)
        sampling = Sampling(seed=drawn.randrange(2**31))
        return _hold(home, now, name, at, {column: found[column] for column in order}, sampling)


def _hold(home: Home, session: Session, name: str, at: int, order: Mapping[str, str], sampling: Sampling) -> Talk:
    course = course_at(session, name, at)
    source = f"{name}/{course.questions[at].probe}" if name != FREE else ""
    talk = talks.create(
        home,
        who=session.reviewer,
        role=session.role,
        files=order,
        sampling=sampling,
        source=source,
        export=session.export,
    )
    _with(home, session, name, msgspec.structs.replace(course, talks=course.talks | {at: talk.id}))
    return talk


def _drawn(session: Session, name: str, at: int) -> random.Random:
    """Another one for each place, and for each talk there: who asks again gets a new order."""
    before = course_of(session, name).talks.get(at, "")
    about = f"{name}\0{at}\0{before}".encode()
    return random.Random(hmac.digest(session.seed.encode(), about, "sha256"))


def recorded(home: Home, session: Session, name: str, at: int, among: Sequence[Seen]) -> Talk | None:
    """That place answered by what the newest probe run on this export recorded for the same question, as a talk; None
    where no run did. Its columns are those that were asked. Where they stand there already, it is the talk that there
    is. Raises ReviewError for a place that there is not."""
    for seen in among:
        record = seen.run.record
        if (seen.kind, record.parent, seen.status.state) != ("probe", session.export, State.succeeded):
            continue
        if found := _of_run(home, session, name, at, seen):
            return found
    return None


def has_recorded(home: Home, session: Session, name: str, at: int, among: Sequence[Seen]) -> bool:
    """Whether `recorded` would find anything."""
    return any(
        _rows(home, session, name, at, seen)
        for seen in among
        if (seen.kind, seen.run.record.parent, seen.status.state) == ("probe", session.export, State.succeeded)
    )


def _of_run(home: Home, session: Session, name: str, at: int, seen: Seen) -> Talk | None:
    rows = _rows(home, session, name, at, seen)
    if not rows:
        return None
    recipe = seen.run.record.recipe
    with _changed(home, session) as now:
        order = sorted(rows)
        _drawn(now, name, at).shuffle(order)
        before = talk_of(home, now, name, at)
        if before is not None and sorted(before.columns) == sorted(order):
            order = list(before.columns)
        sampling = Sampling(
            seed=int(recipe.get("seed", 0)),
            temperature=float(recipe.get("temperature", 0.0)),
            max_new_tokens=int(recipe.get("max_new_tokens", Sampling().max_new_tokens)),
        )
        rounds = tuple(
            Round(
                asked,
                sampling,
                tuple(
                    talks.Answer(column, "done", rows[column].talk[2 * turn + 1].content, finish=_finish(rows[column]))
                    for column in order
                ),
            )
            for turn, asked in enumerate(course_of(now, name).questions[at].turns)
        )
        if before is not None and before.rounds == rounds:
            return before
        found = files(home, now)
        talk = _hold(home, now, name, at, {column: found[column] for column in order}, sampling)
        talk = msgspec.structs.replace(talk, rounds=rounds)
        talks.save(home, talk)
    return talk


def _finish(row: probes.Answer) -> str:
    return "end" if row.reply is None or row.reply.ended else "length"


def _rows(home: Home, session: Session, name: str, at: int, seen: Seen) -> dict[str, probes.Answer]:
    """Column → what it answered to this very question."""
    if name == FREE:
        return {}
    question = course_at(session, name, at).questions[at]
    try:
        there, answers = files(home, session), probes.answers(seen.run.out)
    except KatherineError:
        return {}
    found = {}
    for row in answers:
        # Runs of before it was kept do not say which file it was: then it is the export's of that name.
        column = row.column or f"{session.export}:{row.model}"
        asked = tuple(message.content for message in row.talk[::2])
        is_ours = column in there and row.sha256 in ("", there[column])
        if is_ours and row.probe == question.probe and asked == question.turns:
            found[column] = row
    return found


# ------------------------------------------------------------------------------------------------- faces and verdicts


def faces(talk: Talk, round: int, verdict: Verdict | None = None) -> tuple[Face, ...]:
    """The answers of a round under their letters. While any is still coming, none is shown further than the one that
    has come least far: how fast each is would tell which is which. So would a stop, which ends each as far as it had
    come: it is the same beside a stopped one. The whole text stays in the talk."""
    asked = talk.rounds[round]
    answers = {answer.column: answer for answer in asked.answers}
    coming = [len(answer.text) for answer in answers.values() if answer.state not in OVER]
    furthest = min([*coming, *([] if asked.stopped_at is None else [asked.stopped_at])], default=None)
    marks = marks_of(talk, round, verdict)
    found = []
    for letter, column in zip(LETTERS, talk.columns, strict=False):
        answer = answers[column]
        text = answer.text[:furthest]
        if coming:
            found.append(Face(letter, text, "coming"))
            continue
        state = {"stopped": "stopped", "failed": "silent"}.get(answer.state, "done")
        if state == "done" and answer.finish == "length":
            state = "cut"
        if state != "silent" and text != answer.text:
            state = "stopped"
        found.append(Face(letter, text, state, marks.get(column, Mark())))  # type: ignore[arg-type]
    return tuple(found)


def choice(talk: Talk, verdict: Verdict | None) -> str:
    """What was chosen, as a page calls it: a letter, "same", "none", or "" for nothing yet."""
    if verdict is None:
        return ""
    if verdict.preferred:
        return LETTERS[talk.columns.index(verdict.preferred)]
    return "same" if verdict.tie else "none" if verdict.none_good else ""


def mine(home: Home, session: Session) -> list[Verdict]:
    """The verdicts of this session's person."""
    who = reviews.person(session)
    return [each for each in reviews.verdicts(home, session.export) if reviews.person(each) == who]


def verdict_of(home: Home, session: Session, talk: Talk, round: int) -> Verdict | None:
    """What this person said of the round's answers, None where nothing, or of answers that were given since."""
    said = {answer.column: answer.text for answer in talk.rounds[round].answers} if round < len(talk.rounds) else {}
    for verdict in mine(home, session):
        if (verdict.talk, verdict.round) == (talk.id, round):
            stands = all(said.get(answer.column) == answer.text for answer in verdict.answers)
            return verdict if stands else None
    return None


def marks_of(talk: Talk, round: int, verdict: Verdict | None) -> dict[str, Mark]:
    if verdict is None:
        return {}
    return {answer.column: Mark(answer.thumb, answer.note, answer.rewrite) for answer in verdict.answers}


def judge(
    home: Home,
    session: Session,
    talk: Talk,
    round: int,
    *,
    letter: str = "",
    thumb: int | None = None,
    note: str | None = None,
    rewrite: str | None = None,
    chosen: str | None = None,
) -> None:
    """Record one more thing that the person says of a round: of the answer under a letter, or which is better (a
    letter, "same", "none", "" for no choice). Said once more, it is not recorded again. Raises ReviewError."""
    if round >= len(talk.rounds) or not talk.rounds[round].is_over:
        raise ReviewError("The answers are still coming. Please wait until they are all there.")
    spoke = {answer.column for answer in talk.rounds[round].answers if answer.text}
    with _changing:
        before = verdict_of(home, session, talk, round)
        marks = marks_of(talk, round, before)
        picked = choice(talk, before)
        if letter:
            column = _column(talk, letter)
            if column not in spoke:
                raise ReviewError(f"Answer {letter} did not come, so nothing can be said of it.")
            mark = marks.get(column, Mark())
            marks[column] = Mark(
                mark.thumb if thumb is None else thumb,
                mark.note if note is None else note.strip(),
                mark.rewrite if rewrite is None else rewrite.strip(),
            )
        if chosen is not None:
            picked = chosen
        preferred = _column(talk, picked) if picked not in ("", "same", "none") else ""
        if preferred and preferred not in spoke:
            raise ReviewError(f"Answer {picked} did not come, so it cannot be the better one.")
        if before is not None and picked == choice(talk, before) and marks == marks_of(talk, round, before):
            return
        for mark in marks.values():
            _check(mark)
        _check_room(home, session)
        reviews.judge(
            home,
            talk,
            round=round,
            reviewer=session.reviewer,
            role=session.role,
            marks={column: mark for column, mark in marks.items() if column in spoke},
            preferred=preferred,
            tie=picked == "same",
            none_good=picked == "none",
        )


def _column(talk: Talk, letter: str) -> str:
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= place < len(talk.columns):
        raise ReviewError("There is no answer of that letter here.")
    return talk.columns[place]


def _check(mark: Mark) -> None:
    check_length("Your note", mark.note, reviews.LONGEST_NOTE)
    check_length("Your text", mark.rewrite, reviews.LONGEST_REWRITE)
    if mark.thumb not in (-1, 0, 1):
        raise ReviewError("That is neither good nor bad.")


def _check_room(home: Home, session: Session) -> None:
    if reviews.said(home, session.export, session) >= MOST_LINES:
        raise ReviewError(
            f"You have said {MOST_LINES:,} things about this version, and no more can be kept. What you said is saved."
        )


def check_length(what: str, text: str, most: int) -> None:
    """Raises ReviewError."""
    if len(text) > most:
        raise ReviewError(f"{what} is too long: {len(text):,} letters, and {most:,} can be kept. Please shorten it.")


# ---------------------------------------------------------------------------------------------------- recommendations


def favourite(home: Home, session: Session) -> str:
    """The column that the person preferred most often, "" where none stands out. No page is told even that: whoever
    changes a choice and looks again would learn which letters of two questions are the same file."""
    return reviews.favourite(mine(home, session))


def recommendation(home: Home, session: Session) -> reviews.Recommendation | None:
    """The person's last one, None before any."""
    who = reviews.person(session)
    found = [each for each in reviews.recommendations(home, session.export) if reviews.person(each) == who]
    return found[-1] if found else None


def recommend(home: Home, session: Session, good: bool, with_favourite: bool, note: str) -> None:
    """Record the person's last word. with_favourite: for the column that they preferred most often, which they are
    never told. Said once more, it is not recorded again. Raises ReviewError for a note that is too long."""
    check_length("Your note", note, reviews.LONGEST_NOTE)
    column, note = favourite(home, session) if with_favourite else "", note.strip()
    before = recommendation(home, session)
    if before is not None and (before.good, before.favourite, before.column, before.note) == (
        good, with_favourite, column, note,
    ):  # fmt: skip
        return
    _check_room(home, session)
    given = reviews.Recommendation(
        secrets.token_hex(8), runs.now(), session.reviewer, session.role, session.export, good, column, note,
        len(mine(home, session)), with_favourite,
    )  # fmt: skip
    reviews.recommend(home, given)
