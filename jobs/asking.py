"""Questions to talks, answered by several columns at once in threads of this process, so that no work lives in a page's
handler. Owns an answer from its question to its saving; engines are the pool's, what is kept of a talk is talks'."""

import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Literal

import msgspec

from jobs.pool import Pool, Taken
from katherine import columns, talks
from katherine.columns import Column
from katherine.engines import Finish, Generation
from katherine.errors import DataError, EngineError, KatherineError, NotFound
from katherine.examples import Message
from katherine.progress import Stopped
from katherine.rendering import Renderer
from katherine.settings import Home
from katherine.talks import OVER, Answer, Round, Sampling, State, Talk

# Seconds after which a talk that nobody looks at is stopped: a page asks four times a second while it is answered, and
# a telephone that changes its network is back by then.
ABSENT = 15.0
# Characters of a question: no text of that length fits the 4,096 tokens of an engine's context, whatever its language.
LONGEST = 40_000
# How often it is looked whether readers are there, in seconds.
_LOOK = 0.5
# Seconds that the end of the panel waits for answers to end: they are stopped, and an engine heeds that at once.
_ENDING = 1.0
_log = logging.getLogger("katherine.chat")


class _Line:
    """One column's answer while it is being given. Ends once; what comes after its end is dropped."""

    def __init__(self, column: str):
        self.column = column
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._answer = Answer(column)
        self._pieces: list[str] = []
        self._prompt_tokens = 0
        self._began: float | None = None
        self._first: float | None = None
        self._generation: Generation | None = None

    @classmethod
    def ended(cls, answer: Answer) -> "_Line":
        line = cls(answer.column)
        line._answer = answer
        return line

    @property
    def is_over(self) -> bool:
        return self._answer.state in OVER

    def answer(self) -> Answer:
        with self._lock:
            return self._answer if self.is_over or self._began is None else self._now("answering")

    def tell(self, state: Literal["waiting", "loading"], note: str) -> None:
        with self._lock:
            if not self.is_over:
                self._answer = msgspec.structs.replace(self._answer, state=state, note=note)

    def begin(self, generation: Generation, prompt_tokens: int) -> None:
        with self._lock:
            self._began, self._prompt_tokens = time.monotonic(), prompt_tokens
            self._generation = generation
        if self.stop.is_set():
            generation.cancel()

    def add(self, piece: str) -> None:
        with self._lock:
            if self._first is None and self._began is not None:
                self._first = time.monotonic() - self._began
            self._pieces.append(piece)

    def end(self, state: State, note: str = "", finish: Finish | None = None) -> None:
        with self._lock:
            if self.is_over:
                return
            now = self._now(state)
            if finish is not None:
                now = msgspec.structs.replace(
                    now,
                    finish=finish.finish,
                    prompt_tokens=finish.prompt_tokens,
                    tokens=finish.tokens,
                    seconds=finish.seconds,
                    first_token_seconds=finish.first_token_seconds,
                )
            self._answer = msgspec.structs.replace(now, note=note)

    def order_stop(self, note: str) -> None:
        self.stop.set()
        self.end("stopped", note)
        if (generation := self._generation) is not None:
            with suppress(EngineError):
                generation.cancel()

    def _now(self, state: State) -> Answer:
        """As it is this moment. Of tokens there is no count before the end: nearly every piece is one."""
        return Answer(
            self.column,
            state,
            "".join(self._pieces),
            "",
            "stopped" if state == "stopped" else "",
            self._prompt_tokens,
            len(self._pieces),
            time.monotonic() - self._began if self._began is not None else 0.0,
            self._first,
        )


class _Live:
    """A talk whose last round is being answered; `talk` holds the rounds before it. saved: nothing is left to do."""

    def __init__(self, talk: Talk, question: str, sampling: Sampling, lines: list[_Line]):
        self.talk = talk
        self.question = question
        self.sampling = sampling
        self.lines = lines
        self.viewed = time.monotonic()
        self.saving = False
        self.saved = threading.Event()
        self.unsaved = ""

    @property
    def is_over(self) -> bool:
        return all(line.is_over for line in self.lines)

    def now(self) -> Talk:
        answers = tuple(line.answer() for line in self.lines)
        if self.unsaved:
            answers = tuple(
                msgspec.structs.replace(each, note=f"{each.note} {self.unsaved}".strip()) for each in answers
            )
        rounds = (*self.talk.rounds, Round(self.question, self.sampling, answers))
        return msgspec.structs.replace(self.talk, rounds=rounds)


class Asking:
    """Safe to use from several threads. `absent`: seconds without a `view` after which a talk is stopped."""

    def __init__(self, home: Home, pool: Pool, renderer: Renderer, *, absent: float = ABSENT):
        self._home = home
        self._pool = pool
        self._renderer = renderer
        self._absent = absent
        self._lock = threading.Lock()
        self._live: dict[str, _Live] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()
        self._watching: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------ asking

    def ask(self, talk_id: str, question: str) -> None:
        """Put a question to all columns of a talk. Returns at once. Raises KatherineError for a talk that is still
        answering, or a question that is empty or too long."""
        question = _sound(question)
        self._let_it_save(talk_id)
        with self._lock:
            talk = self._quiet(talk_id)
            self._begin(talk, question, talk.sampling)

    def again(self, talk_id: str, seed: int | None = None) -> None:
        """The last round anew, with that seed or the next one; what was said in it is dropped."""
        self._let_it_save(talk_id)
        with self._lock:
            talk = self._quiet(talk_id)
            last = _last(talk)
            seed = last.sampling.seed + 1 if seed is None else seed
            before = msgspec.structs.replace(talk, rounds=talk.rounds[:-1])
            self._begin(before, last.question, msgspec.structs.replace(last.sampling, seed=seed))

    def edit(self, talk_id: str, round: int, question: str) -> None:
        """Drop a round, counted from 0, and all that follow, and ask this instead."""
        question = _sound(question)
        self._let_it_save(talk_id)
        with self._lock:
            talk = self._quiet(talk_id)
            if not 0 <= round < len(talk.rounds):
                raise NotFound(f"This talk has no question {round + 1}: it has {len(talk.rounds)}.")
            self._begin(msgspec.structs.replace(talk, rounds=talk.rounds[:round]), question, talk.sampling)

    def retry(self, talk_id: str, column: str) -> None:
        """Ask one column of the last round again, that failed or was stopped, while others may still be answering.
        Its engine is brought back. Raises KatherineError where it is answering or has answered."""
        self._let_it_save(talk_id)
        with self._lock:
            live = self._live.get(talk_id)
            if live is None or live.is_over:
                talk = self._quiet(talk_id)
                last = _last(talk)
                before = msgspec.structs.replace(talk, rounds=talk.rounds[:-1])
                lines = [_Line.ended(answer) for answer in last.answers]
                live = _Live(before, last.question, last.sampling, lines)
            at = next((n for n, line in enumerate(live.lines) if line.column == column), None)
            if at is None:
                raise NotFound("This talk has no such column.")
            if live.lines[at].answer().state not in ("failed", "stopped"):
                raise KatherineError("It has answered, or is about to: there is nothing to try again.")
            live.lines[at] = _Line(column)
            live.viewed = time.monotonic()
            self._start(live, [live.lines[at]])

    def stop(self, talk_id: str) -> None:
        """End what is being answered. What was said until then is kept."""
        with self._lock:
            live = self._live.get(talk_id)
        if live is not None:
            self._stop(live, "")

    # ------------------------------------------------------------------------------------------------ reading

    def view(self, talk_id: str) -> Talk:
        """The talk with its answers as they are this moment; also says that its reader is there. Raises NotFound and
        DataError as talks.load does."""
        with self._lock:
            live = self._live.get(talk_id)
            if live is not None:
                live.viewed = time.monotonic()
                return live.now()
        return talks.load(self._home, talk_id)

    def is_coming(self, talk_id: str) -> bool:
        """Whether more of its answers may come; they may be over and not yet written down."""
        with self._lock:
            live = self._live.get(talk_id)
            return live is not None and not live.is_over

    def is_answering(self, talk_id: str) -> bool:
        """Whether they are coming, or not yet written down."""
        with self._lock:
            live = self._live.get(talk_id)
            return live is not None and not live.saved.is_set()

    def close(self) -> None:
        """Stop every talk and keep what was said. Nothing can be asked any more."""
        self._closed.set()
        with self._lock:
            everything = list(self._live.values())
            threads = set(self._threads)
        for live in everything:
            self._stop(live, "The panel was ended.")
        deadline = time.monotonic() + _ENDING
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # ------------------------------------------------------------------------------------------------ a round

    def _quiet(self, talk_id: str) -> Talk:
        """The talk as it is kept, nothing of it being answered. Raises KatherineError where something is."""
        if self._closed.is_set():
            raise KatherineError("The panel is ending.")
        live = self._live.get(talk_id)
        if live is None:
            return talks.load(self._home, talk_id)
        if not live.saved.is_set():
            raise KatherineError("It is still answering: wait for the end, or stop it.")
        return live.now()

    def _let_it_save(self, talk_id: str) -> None:
        """Who asks in the moment in which the last answer is being written down is not refused."""
        with self._lock:
            live = self._live.get(talk_id)
        if live is not None and live.is_over:
            live.saved.wait(5)

    def _begin(self, talk: Talk, question: str, sampling: Sampling) -> None:
        if not talk.columns:
            raise KatherineError("No model was chosen for this talk: begin a new one.")
        live = _Live(talk, question, sampling, [_Line(column) for column in talk.columns])
        self._start(live, live.lines)

    def _start(self, live: _Live, lines: list[_Line]) -> None:
        self._live[live.talk.id] = live
        for line in lines:
            self._pool.expect(line.column)
        for line in lines:
            thread = threading.Thread(target=self._carry_out, args=(live, line), name="answer", daemon=True)
            self._threads.add(thread)
            thread.start()
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="readers", daemon=True)
            self._watching.start()

    def _carry_out(self, live: _Live, line: _Line) -> None:
        try:
            try:
                self._answer(live, line)
            finally:
                self._pool.forget(line.column)
        except Stopped:
            line.end("stopped")
        except Taken as taken:
            line.end("stopped", str(taken))
        except KatherineError as error:
            _log.warning("talk %s, column %s: %s", live.talk.id, line.column, error)
            line.end("failed", _plain(self._home, error))
        except Exception as error:
            _log.exception("talk %s, column %s", live.talk.id, line.column)
            line.end("failed", f"A bug ({type(error).__name__}): the whole story is in panel.log.")
        finally:
            self._end(live)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _answer(self, live: _Live, line: _Line) -> None:
        try:
            column = columns.get(self._home, line.column)
        except KatherineError as error:
            _log.warning("talk %s: %s", live.talk.id, error)
            raise DataError(
                "Its file is not there any more, or is damaged: choose another, or export again."
            ) from error
        if column.sha256 != live.talk.files.get(column.id):
            raise DataError("This is not the file that the talk began with: begin a new talk.")
        # While the engine loads, which may take as long.
        prompt = _promised(lambda: self._prompt(live, column))
        with self._pool.lend(column, line.tell, line.stop) as engine:
            ids = _given(prompt, line.stop)
            context = engine.meta()["context"]
            if len(ids) >= context:
                raise KatherineError(
                    f"The talk is too long for this model: {len(ids):,} tokens (pieces of words), where it can hold "
                    f"{context:,}. Begin a new talk, or ask something shorter."
                )
            sampling = live.sampling
            generation = engine.generate(
                ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=sampling.seed,
                threads=self._pool.threads(),
            )
            try:
                line.begin(generation, len(ids))
                for piece in generation:
                    line.add(piece)
            finally:
                generation.close()
            finish = generation.finish
            assert finish is not None
            full = finish.finish == "length" and finish.tokens < sampling.max_new_tokens
            note = f"Cut off: the talk now fills the {context:,} tokens that this model can hold." if full else ""
            line.end("stopped" if finish.finish == "stopped" else "done", note, finish)

    def _prompt(self, live: _Live, column: Column) -> list[int]:
        heard = talks.heard(live.talk, column.id, len(live.talk.rounds))
        messages = [*heard, Message("user", live.question)]
        return self._renderer.prompt(column.base, messages, column.template_sha256)

    def _end(self, live: _Live) -> None:
        """Writes the round down once all its answers are over."""
        with self._lock:
            # Its threads end after it does, when it may have been gone on with, or removed.
            if not live.is_over or live.saving or (live.saved.is_set() and not live.unsaved):
                return
            live.saving = True
        try:
            talks.save(self._home, live.now())
        except (OSError, KatherineError) as error:
            _log.warning("talk %s could not be saved: %s", live.talk.id, error)
            live.unsaved = f"It could not be written down ({error}): it is lost when the panel ends."
        with self._lock:
            live.saving = False
            if not live.is_over:
                return  # one of its columns was asked again meanwhile
            if not live.unsaved and self._live.get(live.talk.id) is live:
                del self._live[live.talk.id]
            live.saved.set()

    def _stop(self, live: _Live, note: str) -> None:
        for line in list(live.lines):
            line.order_stop(note)
        self._end(live)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            with self._lock:
                waiting = [live for live in self._live.values() if not live.is_over]
                if not waiting:
                    self._watching = None
                    return
                left = [live for live in waiting if time.monotonic() - live.viewed > self._absent]
            for live in left:
                self._stop(live, "Stopped, since nobody was reading it any more.")


def _sound(question: str) -> str:
    """Raises KatherineError where it cannot be asked."""
    question = question.strip()
    if not question:
        raise KatherineError("Write a question first.")
    if len(question) > LONGEST:
        raise KatherineError(f"A question may have {LONGEST:,} characters, and this one has {len(question):,}.")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise KatherineError("The question holds half a character, which is no text: type it anew.") from None
    return question


def _last(talk: Talk) -> Round:
    if not talk.rounds:
        raise KatherineError("Nothing has been asked in this talk yet.")
    return talk.rounds[-1]


def _promised(work: Callable[[], list[int]]) -> Future[list[int]]:
    """What a thread of its own will have found: one that does not keep the process from ending."""
    promised: Future[list[int]] = Future()

    def carry_out() -> None:
        try:
            promised.set_result(work())
        except BaseException as error:
            promised.set_exception(error)

    threading.Thread(target=carry_out, name="prompt", daemon=True).start()
    return promised


def _given(prompt: Future[list[int]], stop: threading.Event) -> list[int]:
    while True:
        try:
            return prompt.result(_LOOK)
        except NotYet:
            if stop.is_set():
                raise Stopped from None


def _plain(home: Home, error: KatherineError) -> str:
    """The error for whoever chats: its first line, which llama.cpp's own follow, and without the file's name, since a
    reviewer must not know which one it is. All of it is in the log."""
    first = str(error).partition("\n")[0]
    said = re.sub(rf"{re.escape(str(home.root))}/\S*\.gguf", "this model", first)
    return said[:1].upper() + said[1:]
