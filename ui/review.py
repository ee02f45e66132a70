"""The reviewer's page: one question at a time, put to every file of an export at once, the answers side by side under
letters. It has no operator's handler in it. What a page may know and do is jobs.sittings' to say; how it is drawn,
static/review.js'.

A visit is one event after another: what the page wants to do and where it is goes up, and all that it shows comes back.
Nothing of a visitor is kept here, so a page goes on after a reload, a lost connection or a restart of the panel.
"""

import hashlib
import json
import logging
import secrets
from dataclasses import asdict
from typing import Any, Literal

import gradio as gr
import msgspec

from jobs import autostop
from jobs.sittings import Scene, Sittings
from katherine import blind, reviews
from katherine.blind import FREE, Session
from katherine.errors import KatherineError, ReviewError
from ui import startup
from ui.component import HTML, when_ready
from ui.edge import shown
from ui.held import held
from ui.panel import Panel
from ui.visitors import role

_log = logging.getLogger("katherine.ui")

# While answers come: as often as a reader can follow. While the machine does other work: it takes minutes anyway.
COMING, AWAY = 0.35, 3.0
# How often it is looked whether the machine is to be switched off, or wanted.
NOTICES = 5.0

Screen = Literal["welcome", "choose", "question", "talk", "verdict"]


class Act(msgspec.Struct, forbid_unknown_fields=True):
    """What a page asks for. id: its own number for it, which comes back. session, screen, course, at: where it is;
    round: the question of a talk that is meant. after: questions of a talk that the page has seen, so that one that is
    sent twice is asked once."""

    id: int
    do: Literal[
        "open", "start", "choose", "go", "say", "ask", "stop", "retry", "recorded", "mark", "verdict", "recommend",
        "approve", "look", "keep_training_waiting", "let_training_begin", "keep_machine",
    ]  # fmt: skip
    session: str = ""
    screen: Screen = "welcome"
    course: str = FREE
    at: int | None = None
    round: int = 0
    letter: str = ""
    thumb: int | None = None
    note: str | None = None
    rewrite: str | None = None
    chosen: str | None = None
    text: str = ""
    name: str = ""
    version: str = ""
    after: int | None = None
    good: bool = False
    favourite: bool = False


class Reading(HTML):
    """All that the page shows. `select` hears what the reader does: `event.act`, as Act has it. It draws its own value,
    and what `part` is sent: kind "stream" or "notices"."""

    def __init__(self) -> None:
        super().__init__(
            None,
            html_template="<div class='r-page'><p class='r-moment'>One moment …</p></div>",
            js_on_load=when_ready(
                "katherineReview.reading(element, props, watch, (act) => trigger('select', {act}))", "katherineReview"
            ),
            apply_default_css=False,
            elem_classes="r-reading",
        )


def _part(kind: str) -> HTML:
    return HTML(
        None,
        html_template="",
        js_on_load=when_ready(f"katherineReview.part('{kind}', props, watch)", "katherineReview"),
        apply_default_css=False,
        visible="hidden",
    )


class _Page:
    def __init__(self, panel: Panel):
        self._home = panel.home
        self._sittings = Sittings(panel.home, panel.history, panel.asking, panel.pool)
        self.reading = Reading()
        self.stream = _part("stream")
        self.notices = _part("notices")
        # Where the page is, and the mark of what it was last sent of it: [session, course, place, mark], or None.
        self.where = held(None)
        self.told = held("")
        self.clock = gr.Timer(COMING, active=False)
        self.watch = gr.Timer(NOTICES)

    # ------------------------------------------------------------------------------------------------ handlers

    def act(self, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        """What the reader did. An error is a part of the answer, in words: the page keeps what was said, and goes on.
        What gets no answer at all it would send again for ever."""
        try:
            given = msgspec.convert(event.act, Act)
        except (msgspec.ValidationError, AttributeError, KeyError, TypeError) as why:
            raise ReviewError("The page sent something that cannot be. Please load it again.") from why
        try:
            return self._acted(given, str(role(request)))
        except Exception as bug:
            reference = secrets.token_hex(4)
            _log.exception("bug %s in the reviewer's page", reference)
            error = f"Something is wrong here ({type(bug).__name__}). Please tell whoever asked you: {reference}."
            return {self.reading: {"heard": given.id, "error": error, "stay": True}, self.where: None}

    def _acted(self, given: Act, who: str) -> dict[Any, Any]:
        error = ""
        session: Session | None = None
        screen, course, at = given.screen, given.course, given.at
        try:
            session = self._session(given, who)
            if session is not None:
                screen, course, at = self._do(given, session)
                session = blind.load(self._home, session.id, session.role)
        except ReviewError as why:
            error = str(why)
        except KatherineError as why:
            # Its words name files and runs.
            _log.warning("a reviewer's wish failed: %s", why)
            error = "That did not work just now. Please try again in a minute."
        return self._answer(given.id, session, screen, course, at, error)

    def look(self, where: list[Any] | None, request: gr.Request) -> Any:
        """The answers as they are this moment, if that is news."""
        if not isinstance(where, list) or len(where) != 4:
            return {self.clock: gr.Timer(active=False)}
        session_id, course, at, mark = where
        try:
            session = blind.load(self._home, str(session_id), str(role(request)))
            scene = self._sittings.scene(session, str(course), int(at))
        except (KatherineError, ValueError, TypeError):
            return {self.clock: gr.Timer(active=False)}
        news = {"course": course, "at": at, "scene": _scene(scene)}
        if (now := _mark(news)) == mark:
            return gr.skip()
        return {self.stream: news, self.where: [session_id, course, at, now], self.clock: _tempo(scene)}

    def countdown(self, told: str) -> Any:
        """What the reader must be told whatever they are doing, if that is news."""
        off, waiting = autostop.view(self._home), self._sittings.waiting()
        # Whole tens of seconds: the page counts for itself.
        news = {
            "off": round(off.left or 0, -1) if off.can_cancel else None,
            "waiting": None if waiting is None else {"seconds": waiting.seconds and round(waiting.seconds, -1)},
        }
        if (now := _mark(news)) == told:
            return gr.skip()
        return {self.notices: news, self.told: now}

    # ------------------------------------------------------------------------------------------------ what was done

    def _session(self, given: Act, who: str) -> Session | None:
        if given.do == "start":
            return self._sittings.begin(given.version, given.name, who)
        if not given.session:
            return None
        try:
            return blind.load(self._home, given.session, who)
        except ReviewError:
            if given.do == "open":
                return None  # left over in the browser, from another home or another person
            raise

    def _do(self, given: Act, session: Session) -> tuple[Screen, str, int | None]:
        """Does it, and says where the page is then."""
        sittings, course, at = self._sittings, given.course, given.at
        here = given.screen, course, at
        match given.do:
            case "start" | "choose":
                return "choose", FREE, None
            case "verdict":
                return "verdict", FREE, None
            case "open":
                if given.screen in ("question", "talk"):
                    return self._go(session, course, at)
            case "go":
                return self._go(session, course, at)
            case "keep_training_waiting":
                sittings.keep(session)
            case "let_training_begin":
                sittings.give_way(session)
            case "keep_machine":
                autostop.cancel(self._home, "the reviewer")
            case "recommend":
                blind.recommend(self._home, session, given.good, given.favourite, given.note or "")
            case "approve":
                sittings.approve(session, given.note or "")
        if at is None:
            return here
        match given.do:
            case "say":
                if given.after == self._asked(session, at):
                    sittings.say(session, at, given.text)
            case "ask":
                sittings.ask(session, course, at)
            case "stop":
                sittings.stop(session, course, at)
            case "retry":
                sittings.retry(session, course, at, given.letter)
            case "recorded":
                sittings.read_recorded(session, course, at)
            case "mark":
                sittings.judge(
                    session,
                    course,
                    at,
                    given.round,
                    letter=given.letter,
                    thumb=given.thumb,
                    note=given.note,
                    rewrite=given.rewrite,
                    chosen=given.chosen,
                )
        return here

    def _go(self, session: Session, course: str, at: int | None) -> tuple[Screen, str, int]:
        """To a place of a course; without one, to where the reader left it."""
        if at is None:
            at = blind.course_of(blind.enter(self._home, session, course), course).at
        self._sittings.arrive(session, course, at)
        return "talk" if course == FREE else "question", course, at

    def _asked(self, session: Session, at: int) -> int:
        if FREE not in session.courses:
            return 0
        talk = blind.talk_of(self._home, session, FREE, at)
        return 0 if talk is None else len(self._sittings.scene(session, FREE, at).turns)

    # ------------------------------------------------------------------------------------------------ what is shown

    def _answer(
        self, heard: int, session: Session | None, screen: Screen, course: str, at: int | None, error: str
    ) -> dict[Any, Any]:
        still: dict[Any, Any] = {self.where: None, self.clock: gr.Timer(active=False)}
        if session is None:
            versions = [{"key": each.key, "made": each.made} for each in self._sittings.versions()]
            return still | {self.reading: {"heard": heard, "error": error, "screen": "welcome", "versions": versions}}
        state: dict[str, Any] = {
            "heard": heard,
            "error": error,
            "session": session.id,
            "name": session.reviewer,
            "screen": screen,
        }
        try:
            if screen in ("question", "talk") and at is not None:
                scene = self._sittings.scene(session, course, at)
                state |= self._place(session, course, at) | {"scene": _scene(scene)}
                news = {"course": course, "at": at, "scene": state["scene"]}
                where = [session.id, course, at, _mark(news)]
                return {self.reading: state, self.where: where, self.clock: _tempo(scene)}
            if screen == "verdict":
                return still | {self.reading: state | self._last_word(session)}
        except ReviewError as why:
            state["error"] = error or str(why)
        return still | {self.reading: state | {"screen": "choose"} | self._choices(session)}

    def _choices(self, session: Session) -> dict[str, Any]:
        offers = [asdict(offer) for offer in blind.offers(self._home, session)]
        talks = session.courses[FREE].talks if FREE in session.courses else {}
        return {"offers": offers, "talks": len(talks)}

    def _place(self, session: Session, course: str, at: int) -> dict[str, Any]:
        there = blind.course_of(session, course)
        places = len(there.questions) if course != FREE else len(there.talks)
        return {"course": course, "at": at, "of": places}

    def _last_word(self, session: Session) -> dict[str, Any]:
        given = blind.recommendation(self._home, session)
        may = self._sittings.may_approve(session.role)
        return {
            # What they asked for: whether a favourite stood out would tell which letters are the same file.
            "given": None
            if given is None
            else {"good": given.good, "note": given.note, "favourite": given.favourite or given.column != ""},
            "judged": len(blind.mine(self._home, session)),
            "approval": self._sittings.approval(session) if may else None,
            "longest": reviews.LONGEST_NOTE,
        }


def _scene(scene: Scene) -> dict[str, Any]:
    """As the page takes it. Letters, texts and what this person said of them: nothing else of an answer."""
    question = scene.question
    return {
        "state": scene.state,
        "for_person": question is not None and question.for_person,
        "turns_of": len(question.turns) if question is not None else 0,
        # What is asked first is known before it is asked.
        "asks": question.turns[0] if question is not None else "",
        "turns": [
            {"question": turn.question, "choice": turn.choice, "faces": msgspec.to_builtins(turn.faces)}
            for turn in scene.turns
        ],
        "busy": None if scene.busy is None else {"until": scene.busy.until},
        "recorded": scene.recorded,
    }


def _tempo(scene: Scene) -> gr.Timer:
    return gr.Timer(AWAY if scene.busy else COMING, active=scene.state == "coming")


def _mark(news: Any) -> str:
    return hashlib.sha256(json.dumps(news).encode()).hexdigest()[:16]


def build(panel: Panel) -> gr.Blocks:
    with startup.page("Katherine: review") as page:
        made = _Page(panel)
        # Not queued: the answer holds its errors, and a lost connection must not end more than one request.
        given: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        made.reading.select(
            shown(made.act),
            outputs=[made.reading, made.where, made.clock],
            trigger_mode="multiple",
            **given,
        )
        made.clock.tick(shown(made.look), made.where, [made.stream, made.where, made.clock], **given)
        made.watch.tick(shown(made.countdown), made.told, [made.notices, made.told], **given)
        page.load(shown(made.countdown), made.told, [made.notices, made.told], **given)
    return page
