"""A reviewer's sitting, live: the question at hand is put to all files of the export at once, turn by turn, and what a
page may see of it. What is kept of it is katherine.blind's, the answering jobs.asking's."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from jobs import errands
from jobs.asking import Asking
from jobs.pool import Pool
from katherine import approval, blind, pace, reviews
from katherine.blind import FREE, Face, Question, Session, Version
from katherine.errors import DataError, KatherineError, NotFound, ReviewError
from katherine.history import History
from katherine.runs import ENDED, State
from katherine.settings import Home
from katherine.talks import OVER, Talk

_log = logging.getLogger("katherine.review")

# Of a question typed by a reviewer, in characters: a page of text, which leaves an engine's context room for answers.
LONGEST_QUESTION = 4_000
# What is asked of the errand that approves, and its kind.
APPROVE = "approve"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answers, under their letters. choice: which is better, as blind.choice has it."""

    question: str
    faces: tuple[Face, ...]
    choice: str = ""


@dataclass(frozen=True, slots=True)
class Busy:
    """The machine does other work first. until: ISO 8601, when that may be over at the earliest; "" where nobody
    knows."""

    until: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A place of a course as a page sees it. question: None in a free talk. turns: those that were asked so far.
    state: "new" (nothing was asked), "coming" (answers are on their way), "there", or "broken" (they ended before
    they were all there, or none came: `ask` begins them anew). recorded: answers of an earlier test can be read
    instead."""

    question: Question | None
    turns: tuple[Turn, ...]
    state: Literal["new", "coming", "there", "broken"]
    busy: Busy | None = None
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """Somebody else's work waits for the machine. seconds: until it begins; None where it waits for a word."""

    seconds: float | None


class Sittings:
    """The sittings of all reviewers. Keeps nothing itself: every call says which session and place it is about."""

    def __init__(self, home: Home, history: History, asking: Asking, pool: Pool):
        self._home = home
        self._history = history
        self._asking = asking
        self._pool = pool

    def versions(self) -> list[Version]:
        """What can be reviewed, newest first."""
        return blind.versions(self._home, self._history.runs())

    def begin(self, key: str, reviewer: str, role: str) -> Session:
        """key: a version's, "" for the newest. Raises ReviewError."""
        found = self.versions()
        if not found:
            raise ReviewError("There is nothing to review yet. Whoever runs the training will tell you when.")
        chosen = found[0] if not key else blind.version(self._home, self._history.runs(), key)
        return blind.begin(self._home, chosen.export, reviewer, role)

    # ------------------------------------------------------------------------------------------------ a question

    def arrive(self, session: Session, name: str, at: int) -> Session:
        """Come to a place of a course; a set's question is asked, unless it has been. What was still coming at another
        place is stopped: its reader is here. Raises ReviewError."""
        session = blind.move(self._home, blind.enter(self._home, session, name), name, at)
        here = blind.course_of(session, name).talks.get(at, "")
        for left in self._coming_beside(session, here):
            self._asking.stop(left)
        if name == FREE:
            return session
        talk = self._talk(session, name, at)
        if talk is None or not talk.rounds or _came_to_nothing(talk):
            self.ask(session, name, at)
            session = blind.load(self._home, session.id, session.role)
        return session

    def ask(self, session: Session, name: str, at: int) -> None:
        """The answers at this place (anew, where there were some): of a set's question all turns, of a free talk the
        last. Raises ReviewError."""
        talk = self._talk(session, name, at)
        if talk is not None and talk.rounds and not talk.rounds[-1].is_over:
            return  # asked twice: they are on their way
        self._check_alone(session, talk)
        with _plainly():
            if talk is not None and talk.rounds:
                self._asking.again(talk.id)
                return
            if name == FREE:
                raise ReviewError("There is no question yet. Type one first.")
            talk = talk or blind.open_talk(self._home, session, name, at)
            self._asking.ask(talk.id, blind.course_of(session, name).questions[at].turns[0])

    def say(self, session: Session, at: int, question: str) -> None:
        """The next question of the free talk at this place. Raises ReviewError."""
        question = question.strip()
        if not question:
            raise ReviewError("Please type a question first.")
        blind.check_length("Your question", question, LONGEST_QUESTION)
        talk = self._talk(session, FREE, at)
        if talk is not None and talk.rounds and not talk.rounds[-1].is_over:
            raise ReviewError("The answers to your last question are still coming.")
        self._check_alone(session, talk)
        with _plainly():
            talk = talk or blind.open_talk(self._home, session, FREE, at)
            self._asking.ask(talk.id, question)

    def stop(self, session: Session, name: str, at: int) -> None:
        """Enough: the answers end where they are."""
        if (talk := self._talk(session, name, at)) is not None:
            with _plainly():
                self._asking.stop(talk.id)

    def retry(self, session: Session, name: str, at: int, letter: str) -> None:
        """One answer that did not come, once more. Raises ReviewError."""
        talk = self._talk(session, name, at)
        place = blind.LETTERS.find(letter) if len(letter) == 1 else -1
        if talk is None or not 0 <= place < len(talk.columns):
            raise ReviewError("There is no answer of that letter here.")
        self._check_alone(session, talk)
        with _plainly():
            if talk.rounds and talk.rounds[-1].is_over and talk.rounds[-1].stopped_at is not None:
                # Which of them had ended by itself, and cannot be asked again, would say which is fast.
                self._asking.again(talk.id)
            else:
                self._asking.retry(talk.id, talk.columns[place])

    def read_recorded(self, session: Session, name: str, at: int) -> None:
        """Take the answers that were recorded for this question. Raises ReviewError where there are none."""
        before = self._talk(session, name, at)
        if blind.recorded(self._home, session, name, at, self._history.runs()) is None:
            raise ReviewError("No answers were recorded for this question.")
        if before is not None and before.rounds and not before.rounds[-1].is_over:
            with _plainly():
                self._asking.stop(before.id)

    def scene(self, session: Session, name: str, at: int) -> Scene:
        """As it is this moment. Looking keeps the answers coming, and asks a set's next turn when one is over."""
        course = blind.course_at(session, name, at)
        question = course.questions[at] if name != FREE else None
        talk = self._talk(session, name, at)
        if talk is None or not talk.rounds:
            return self._unanswered(session, name, at, question, (), "new")
        last = talk.rounds[-1]
        turns = tuple(self._turn(session, talk, number) for number in range(len(talk.rounds)))
        # Over, and written down: before that nothing can be said of it.
        if not last.is_over or self._asking.is_answering(talk.id):
            return self._unanswered(session, name, at, question, turns, "coming")
        if _came_to_nothing(talk) or any(answer.state == "stopped" for answer in last.answers if not answer.text):
            return self._unanswered(session, name, at, question, turns, "broken")
        if question is not None and len(talk.rounds) < len(question.turns):
            if any(answer.state == "stopped" for answer in last.answers):
                return self._unanswered(session, name, at, question, turns, "broken")
            self._ask_next(session, name, at, talk, question)
            return Scene(question, turns, "coming")
        return Scene(question, turns, "there")

    def judge(
        self,
        session: Session,
        name: str,
        at: int,
        round: int,
        *,
        letter: str = "",
        thumb: int | None = None,
        note: str | None = None,
        rewrite: str | None = None,
        chosen: str | None = None,
    ) -> None:
        """As blind.judge, by place. Raises ReviewError."""
        talk = self._talk(session, name, at)
        if talk is None:
            raise ReviewError("There are no answers here yet.")
        if round == len(talk.rounds) - 1 and self._asking.is_answering(talk.id):
            raise ReviewError("The answers are still coming. Please wait until they are all there.")
        try:
            blind.judge(
                self._home,
                session,
                talk,
                round,
                letter=letter,
                thumb=thumb,
                note=note,
                rewrite=rewrite,
                chosen=chosen,
            )
        except ReviewError:
            raise
        except DataError as error:
            _log.warning("a verdict was refused: %s", error)
            raise ReviewError("These answers have changed meanwhile. Please look at them again.") from None

    def _ask_next(self, session: Session, name: str, at: int, talk: Talk, question: Question) -> None:
        """The set's next turn, once nothing else of the session is coming. Raises ReviewError."""
        if self._coming_beside(session, talk.id):
            return
        try:
            with _plainly():
                self._asking.ask(talk.id, question.turns[len(talk.rounds)])
        except ReviewError:
            # Where the same person looks twice, in two tabs, the other may have asked it in this moment.
            now = self._talk(session, name, at)
            if now is None or len(now.rounds) <= len(talk.rounds):
                raise

    def _coming_beside(self, session: Session, talk_id: str) -> list[str]:
        """The session's talks whose answers are coming, without this one."""
        found = {each for course in session.courses.values() for each in course.talks.values()} - {talk_id}
        return [each for each in found if self._asking.is_coming(each)]

    def _check_alone(self, session: Session, talk: Talk | None) -> None:
        """Each question takes a thread and an engine's time for every file, so one at a time is answered."""
        if self._coming_beside(session, "" if talk is None else talk.id):
            raise ReviewError(
                "The answers to another of your questions are still coming. Wait until they are there, or stop them."
            )

    def _talk(self, session: Session, name: str, at: int) -> Talk | None:
        """The talk at that place as it is this moment, None before there is one."""
        found = blind.talk_of(self._home, session, name, at)
        # Nobody but the session leads to a talk, and the session leads to its own alone.
        if found is None or (found.role, found.export) != (session.role, session.export):
            return None
        # One that is over is on the disk: engines that were asked before the server started again know nothing of it.
        if found.rounds and found.rounds[-1].is_over and not self._asking.is_answering(found.id):
            return found
        try:
            return self._asking.view(found.id)
        except (NotFound, DataError):
            return found

    def _turn(self, session: Session, talk: Talk, number: int) -> Turn:
        is_over = talk.rounds[number].is_over
        verdict = blind.verdict_of(self._home, session, talk, number) if is_over else None
        return Turn(talk.rounds[number].question, blind.faces(talk, number, verdict), blind.choice(talk, verdict))

    def _unanswered(
        self,
        session: Session,
        name: str,
        at: int,
        question: Question | None,
        turns: tuple[Turn, ...],
        state: Literal["new", "coming", "broken"],
    ) -> Scene:
        # While words come, nobody needs to be told to come back.
        speaks = bool(turns) and any(face.text for face in turns[-1].faces)
        busy = None if speaks else self.busy()
        recorded = question is not None and (busy is not None or state == "broken")
        recorded = recorded and blind.has_recorded(self._home, session, name, at, self._history.runs())
        return Scene(question, turns, state, busy, recorded)

    # ------------------------------------------------------------------------------------------------ the machine

    def busy(self) -> Busy | None:
        """What the machine does before it can answer, None where nothing is in the way."""
        for seen in self._history.under_way():
            if seen.status.state in ENDED or seen.status.state is State.queued:
                continue
            left = pace.of(seen.run, seen.status).seconds_left
            until = "" if left is None else (datetime.now(UTC) + timedelta(seconds=left)).isoformat(timespec="seconds")
            return Busy(until)
        return None

    def waiting(self) -> Waiting | None:
        """Whether a training waits for the machine while answers are given on it."""
        view = self._pool.view()
        return Waiting(view.gives_way_in) if view.wanted_by else None

    def keep(self, session: Session) -> None:
        """The training waits five more minutes."""
        with _plainly():
            self._pool.keep(session.reviewer)

    def give_way(self, session: Session) -> None:
        """The training may begin. Where none waits, nothing is done."""
        with _plainly():
            self._pool.give_way(session.reviewer)

    # ---------------------------------------------------------------------------------------------------- approving

    def may_approve(self, role: str) -> bool:
        return approval.may_approve(self._home, role)

    def approve(self, session: Session, note: str) -> None:
        """Begin to approve the export: its files are read whole in a process of their own, which takes minutes. Raises
        ReviewError for who may not."""
        if not self.may_approve(session.role):
            raise ReviewError("You may not approve a version. Your recommendation was kept.")
        blind.check_length("Your note", note, reviews.LONGEST_NOTE)
        request = {"export": session.export, "who": session.reviewer, "role": session.role, "note": note.strip()}
        with _plainly():
            errands.start(self._home, APPROVE, request, session.reviewer)

    def approval(self, session: Session) -> Literal["", "checking", "approved", "failed"]:
        """How this person's approval of the export stands."""
        mine = {"export": session.export, "who": session.reviewer, "role": session.role}
        standing = approval.standing(self._home, session.export)
        given = standing.approval
        if standing.valid and given is not None and (given.who, given.role) == (session.reviewer, session.role):
            return "approved"
        for errand in errands.everyone(self._home):
            if errand.kind == APPROVE and mine.items() <= errand.request.items():
                state = errand.status().state
                if state not in ENDED:
                    return "checking"
                # One that succeeded and stands no more was withdrawn: it can be given again.
                return "" if state is State.succeeded else "failed"
        return ""


def _came_to_nothing(talk: Talk) -> bool:
    """Whether the last question ended without a word from anybody."""
    last = talk.rounds[-1]
    return all(answer.state in OVER and not answer.text for answer in last.answers)


@contextmanager
def _plainly() -> Iterator[None]:
    """What is said to operators names files and runs: a reviewer is told in other words, and the log has theirs."""
    try:
        yield
    except ReviewError:
        raise
    except KatherineError as error:
        _log.warning("a reviewer's wish failed: %s", error)
        raise ReviewError("That did not work just now. Please try again in a minute.") from None
