"""The engines that are loaded, one a column, shared by everybody who chats. Owns what may be loaded: the GPU's slot,
the memory, who has to go, and the giving way to a run that waits. What is asked of an engine is asking's."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from jobs import autostop, queue, slot
from jobs.slot import Slot
from katherine import columns, cores, engines, gpu, memory, runs
from katherine.columns import Column
from katherine.engines import Engine
from katherine.errors import Busy, EngineError, KatherineError
from katherine.progress import Stopped
from katherine.runs import Run
from katherine.settings import Home

# A coffee. Loading 7 GB from a network volume takes minutes, and while chat holds the GPU a pod is not stopped.
IDLE = 600.0
# A run is given way to at once where nobody has asked anything for this long, and otherwise with as much notice: time
# to see the notice on a telephone and press a button.
QUIET = 60.0
NOTICE = 60.0
# Where there are several GPUs, a run that is seen to wait may just be taking another one: the note that says so and the
# run's own status are two writes to a volume that may be slow.
SURE = 2.0
# What the button gives.
KEPT = 300.0
# How often it is looked who waits and what is idle, in seconds; and who wakes up by himself to look again.
TICK = 0.5
# What an engine takes beside its file. Measured on the small base: 145 MB, of which 94 MB are 4,096 tokens of context.
# Of a 9B Qwen3.5, reckoned: context 134 MB, recurrent state 50 MB, 512 tokens of activations and 64 rows of logits
# 600 MB, a tenth of its smallest quant; and on a GPU what CUDA and its kernels take for themselves, about half a GB.
SHARE = 0.1
FIXED = 300_000_000
FIXED_ON_GPU = 800_000_000
_log = logging.getLogger("katherine.chat")

State = Literal["loading", "ready", "answering"]
# Says (state of the answer, why it waits).
Tell = Callable[[Literal["waiting", "loading"], str], None]


class Taken(KatherineError):
    """The engine was taken away while it answered; the message says what for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One engine. pid: None while it loads. bytes: that it holds of main memory; on a GPU, about what it took there."""

    column: str
    pid: int | None
    bytes: int
    state: State


@dataclass(frozen=True, slots=True)
class View:
    """used: bytes of all engines. free: bytes that another could take. on_gpu: which memory these are of. wanted_by:
    the run that waits for the GPU while it is held for chat, "" for none; gives_way_in: seconds until it gets it."""

    loaded: tuple[Loaded, ...]
    used: int
    free: int
    on_gpu: bool
    wanted_by: str = ""
    gives_way_in: float | None = None


@dataclass(slots=True, eq=False)
class _Held:
    """One engine from the moment it was decided to load it. taken: why it is being ended, once that was decided.
    ending: it was killed, and stays until its end was waited for: only then is its memory free."""

    column: Column
    needs: int
    used: float
    state: State = "loading"
    engine: Engine | None = None
    taken: str = ""
    ending: bool = False
    abandon: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Wanted:
    run: str
    what: str
    at: float


class Pool:
    """Safe to use from several threads. `limit`: bytes that all engines together may take, None for what the machine
    has free."""

    def __init__(
        self,
        home: Home,
        *,
        idle: float = IDLE,
        limit: int | None = None,
        quiet: float = QUIET,
        notice: float = NOTICE,
        kept: float = KEPT,
    ):
        self._home = home
        # The last first: runs take the first.
        self._cards = gpu.usable()[::-1]
        self._idle = idle
        self._limit = limit
        self._quiet = quiet
        self._notice = notice
        self._kept_for = kept
        self._changed = threading.Condition()
        self._held: dict[str, _Held] = {}
        # Killed, and not waited for yet: waiting may take seconds, so it is never done under `_changed`. `_reaping`
        # lets whoever unloads return when it is done, whoever does it; it is taken before `_changed`, never after.
        self._dying: list[_Held] = []
        self._reaping = threading.Lock()
        self._expected: Counter[str] = Counter()
        self._slot: Slot | None = None
        self._asked = time.monotonic()
        self._wanted: _Wanted | None = None
        self._keeper: threading.Thread | None = None
        self._on_gpu = False
        self._closed = threading.Event()

    # ------------------------------------------------------------------------------------------------ for pages

    def view(self) -> View:
        """What is loaded and how much room there is. Takes milliseconds."""
        with self._changed:
            now, on_gpu = time.monotonic(), self._on_gpu
            loaded = tuple(
                Loaded(each.column.id, each.engine.pid if each.engine else None, self._bytes(each, on_gpu), each.state)
                for each in self._held.values()
            )
            used = sum(each.bytes for each in loaded)
            wanted = self._wanted
            return View(
                loaded,
                used,
                self._free(on_gpu),
                on_gpu,
                wanted.run if wanted else "",
                max(0.0, wanted.at - now) if wanted else None,
            )

    def keep(self, who: str) -> None:
        """Somebody chats and asks the waiting run for five more minutes. Raises KatherineError where none waits."""
        with self._changed:
            if self._wanted is None:
                raise KatherineError("No run waits for the GPU any more: go on.")
            self._wanted = _Wanted(self._wanted.run, self._wanted.what, time.monotonic() + self._kept_for)
            _log.info("%s asked run %s to wait for another %.0f s", who, self._wanted.run, self._kept_for)

    def give_way(self, who: str) -> bool:
        """Unload everything now, so that the waiting run may begin. Where none waits, nothing is done: False."""
        with self._changed:
            if self._wanted is None:
                return False
            _log.info("%s ended the chat's hold of the GPU", who)
            self._take_all(_gave_way(self._wanted.what))
        self._reap()
        return True

    def unload(self, column_id: str) -> None:
        """End one engine, whatever it is doing. One that is not loaded is left alone."""
        with self._changed:
            if each := self._held.get(column_id):
                self._take(each, "Stopped, since the model was unloaded.")
        self._reap()

    def close(self) -> None:
        """End every engine and let the GPU go. The pool loads nothing any more."""
        self._closed.set()
        with self._changed:
            self._take_all("Stopped, since the panel ends.")
        self._reap()
        with self._changed:
            # Those that are loading end within a fifth of a second.
            self._changed.wait_for(lambda: self._slot is None, timeout=5)

    # ------------------------------------------------------------------------------------------------ for asking

    def expect(self, column_id: str) -> None:
        """Somebody is about to borrow the column: it is not unloaded to make room for another before it was lent."""
        with self._changed:
            self._expected[column_id] += 1

    def forget(self, column_id: str) -> None:
        """Takes one `expect` back."""
        with self._changed:
            self._expected -= Counter({column_id: 1})
            self._changed.notify_all()

    def threads(self) -> int | None:
        """How many threads an answer should use, beside those that are given at the same time; None for all."""
        with self._changed:
            if self._on_gpu:
                return None
            busy = sum(each.state != "ready" or self._expected[each.column.id] > 0 for each in self._held.values())
            return max(1, cores.count() // max(1, busy))

    @contextmanager
    def lend(self, column: Column, tell: Tell, stop: threading.Event) -> Iterator[Engine]:
        """The column's engine, for one borrower at a time; loads it, or waits until it can be. Says meanwhile why.

        Raises Stopped once `stop` is set; Taken where the engine is needed for something else while it is lent;
        DataError where the file or its template is not the one of its manifest; NotFound and EngineError as Engine
        does, or where the model does not fit even alone.
        """
        with self._changed:
            self._asked = time.monotonic()
        tell("loading", "")
        try:
            columns.verify(column)
        except KatherineError:
            self.unload(column.id)
            raise
        # It takes a child that may need a minute, once; so without the lock, and before anything is lent nobody knows.
        self._on_gpu = engines.offloads()
        held = self._get(column, tell, stop)
        try:
            if held.engine is None:
                self._load(held)
            assert held.engine is not None
            yield held.engine
        except EngineError as error:
            if held.taken:
                raise Taken(held.taken) from error
            raise
        finally:
            self._put_back(held)

    def _get(self, column: Column, tell: Tell, stop: threading.Event) -> _Held:
        """The column's place, held by the caller alone. Its engine is None where it is the caller's to load."""
        while True:
            with self._changed:
                if stop.is_set():
                    raise Stopped
                if self._closed.is_set():
                    raise EngineError("The panel is ending.")
                held = self._held.get(column.id)
                if held and held.engine and not held.engine.is_alive:
                    self._drop(held)
                if held and held.ending:
                    tell("loading", "")
                elif held and held.state == "ready":
                    held.state = "answering"
                    self._asked = held.used = time.monotonic()
                    return held
                elif held:
                    loading = held.state == "loading"
                    tell("loading" if loading else "waiting", "" if loading else "It is answering somebody else first.")
                elif why := self._obstacle(column):
                    tell("waiting", why)
                else:
                    held = _Held(column, self._needs(column), time.monotonic())
                    self._held[column.id] = held
                    tell("loading", "")
                    return held
                if not self._dying:
                    self._changed.wait(TICK)
                    continue
            self._reap()

    def _load(self, held: _Held) -> None:
        # It was decided to load it with the slot held, which is held for as long as it is there.
        assert self._slot is not None
        engine = Engine(held.column.path, abandon=held.abandon, card=self._slot.name)
        try:
            # Between its hashing and its loading it may have been replaced.
            columns.verify(held.column)
            columns.check_template(held.column, engine.meta()["template"])
            with self._changed:
                if held.taken or self._closed.is_set():
                    raise EngineError("It was taken while it loaded.")
                held.engine, held.state, held.used = engine, "answering", time.monotonic()
                self._changed.notify_all()
        except BaseException:
            engine.close()
            raise

    def _put_back(self, held: _Held) -> None:
        with self._changed:
            self._asked = held.used = time.monotonic()
            if held.engine is None or held.ending or not held.engine.is_alive:
                self._drop(held)
            else:
                held.state = "ready"
                self._changed.notify_all()
            self._settle()
        self._reap()

    # ------------------------------------------------------------------------------------------------ room

    def _obstacle(self, column: Column) -> str:
        """Why the column cannot be loaded now, in words, or "": then the slot is held and there is room. Unloads what
        is idle for it. Raises EngineError where it would not fit alone either."""
        if self._slot is None:
            if len(slot.free(self._home, self._cards)) <= 1 and (run := self._next_run()):
                return f"The machine is about to begin with {_named(run)}. The answer comes when that is done."
            try:
                self._slot = slot.take_one(self._home, "chat", self._cards)
            except Busy as busy:
                return _busy(self._home, self._cards, busy)
            self._watch()
        needs = self._needs(column)
        if needs > (free := self._free(self._on_gpu)):
            if any(each.ending for each in self._held.values()):
                return _MAKES_ROOM
            if any(each.state == "loading" for each in self._held.values()):
                return "Waiting until the other models are loaded: there may not be memory for all at once."
            idle = [each for each in self._held.values() if each.state == "ready"]
            unwanted = [each for each in idle if not self._expected[each.column.id]]
            if unwanted:
                self._drop(min(unwanted, key=lambda each: each.used))
                return _MAKES_ROOM
            if self._held:
                return "There is not memory for all the models at once, so they take turns: this one comes next."
            self._settle()
            raise EngineError(
                f"This model needs about {needs / 1e9:.1f} GB of {'GPU ' * self._on_gpu}memory and only "
                f"{free / 1e9:.1f} GB are free. End what else is running, or choose a smaller one."
            )
        return ""

    def _needs(self, column: Column) -> int:
        return needs(column, self._on_gpu)

    def _free(self, on_gpu: bool) -> int:
        """Bytes that another engine could take."""
        loading = sum(each.needs for each in self._held.values() if each.engine is None)
        pids = [each.engine.pid for each in self._held.values() if each.engine]
        free = memory.card(self._slot.name if self._slot else self._cards[0]) if on_gpu else None
        free = memory.host(pids) if free is None else free
        free -= loading
        if self._limit is not None:
            free = min(free, self._limit - sum(each.needs for each in self._held.values()))
        return max(0, free)

    def _bytes(self, held: _Held, on_gpu: bool) -> int:
        return held.needs if on_gpu or held.engine is None else memory.resident(held.engine.pid)

    # ------------------------------------------------------------------------------------------------ ends

    def _take(self, held: _Held, why: str) -> None:
        held.taken = why
        held.abandon.set()
        if held.engine:
            self._drop(held)

    def _take_all(self, why: str) -> None:
        for each in list(self._held.values()):
            self._take(each, why)
        self._settle()

    def _drop(self, held: _Held) -> None:
        """Kills it; `_reap` must follow, without the lock. One that still loads stays until its loader has ended it:
        only then is its memory free."""
        if held.ending:
            return
        if held.engine:
            held.ending = True
            held.engine.kill()
            self._dying.append(held)
        elif self._held.get(held.column.id) is held:
            del self._held[held.column.id]
        self._changed.notify_all()

    def _reap(self) -> None:
        """Wait for the end of those that were killed, and let go what they held."""
        with self._reaping:
            with self._changed:
                dying, self._dying = self._dying, []
            for held in dying:
                assert held.engine is not None
                held.engine.close()
                with self._changed:
                    if self._held.get(held.column.id) is held:
                        del self._held[held.column.id]
                    self._changed.notify_all()
                    self._settle()

    def _settle(self) -> None:
        """Let the GPU go once nothing is loaded."""
        if self._held or self._slot is None:
            return
        self._slot.release()
        self._slot = self._wanted = None
        self._changed.notify_all()
        if not self._closed.is_set() and not slot.is_held(self._home, "supervisor"):
            try:
                autostop.begin(self._home, "chat")
            except OSError as error:
                _log.warning("auto-stop could not begin: %s", error)

    # ------------------------------------------------------------------------------------------------ watching

    def _watch(self) -> None:
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = threading.Thread(target=self._keep_watch, name="pool", daemon=True)
            self._keeper.start()

    def _keep_watch(self) -> None:
        while not self._closed.wait(TICK):
            run = None
            try:
                # What waits while another GPU is free does not wait for ours.
                run = None if slot.free(self._home, self._cards) else self._next_run()
            except OSError as error:
                _log.warning("the queue cannot be read: %s", error)
            with self._changed:
                if self._slot is None:
                    self._keeper = None
                    return
                self._end_idle()
                self._heed(run)
            self._reap()

    def _next_run(self) -> Run | None:
        """The run that a supervisor is about to begin with; without a supervisor there is nothing to read."""
        if not slot.is_held(self._home, "supervisor"):
            return None
        # One that has its GPU already is queued for a moment longer.
        holding = {holder.run for card in self._cards if (holder := slot.holder(self._home, card))}
        return next((run for run in queue.waiting(self._home) if run.id not in holding), None)

    def _end_idle(self) -> None:
        now = time.monotonic()
        for each in list(self._held.values()):
            if each.engine and (not each.engine.is_alive or (each.state == "ready" and now - each.used > self._idle)):
                self._drop(each)
        self._settle()

    def _heed(self, run: Run | None) -> None:
        if self._slot is None or run is None:
            self._wanted = None
            return
        now = time.monotonic()
        if any(each.state != "ready" for each in self._held.values()):
            self._asked = now
        if self._wanted is None or self._wanted.run != run.id:
            quiet = now - self._asked >= self._quiet
            patience = 0.0 if quiet else self._notice
            self._wanted = _Wanted(run.id, _named(run), now + max(patience, SURE if len(self._cards) > 1 else 0.0))
        if now >= self._wanted.at:
            _log.info("chat gives way to run %s", run.id)
            self._take_all(_gave_way(self._wanted.what))


def needs(column: Column, on_gpu: bool) -> int:
    """About how many bytes the column's engine takes."""
    return int(column.bytes * (1 + SHARE)) + (FIXED_ON_GPU if on_gpu else FIXED)


# ---------------------------------------------------------------------------------------------------------- in words

_MAKES_ROOM = "Another model makes room for this one."
_KINDS = {
    "sft": "a training (SFT)",
    "dpo": "a training (DPO)",
    "export": "an export, which makes model files",
    "probe": "a series of test questions",
}


def _named(run: Run) -> str:
    return f"{_KINDS.get(run.record.kind, run.record.kind)}, run {run.id}"


def _gave_way(what: str) -> str:
    return f"Stopped, since {what}, needed the machine. Ask again when that is done."


def _busy(home: Home, cards: Sequence[str], busy: Busy) -> str:
    """Who has the GPU, for somebody who may never have heard of it; of several, the one that is asked for first."""
    holder = slot.holder(home, cards[0])
    if holder is not None and holder.what == "chat":
        return f"The machine is busy with another chat (process {holder.pid}). The answer comes when that has ended."
    if holder is None or holder.run is None:
        return str(busy)
    try:
        run = runs.load(home, holder.run)
        status = run.status()
    except KatherineError:
        return str(busy)
    at = f", step {status.step} of {status.of}" if status.of else f", {status.phase}" if status.phase else ""
    return f"The machine is busy with {_named(run)}{at}. The answer comes when that is done."
