"""Drains the queue, one run on each GPU, detached from whoever asked. It spawns the workers, owns the wait for each,
its log and status.json while it runs, and writes how it ended. What a run does is the worker's; who may start is the
queue's."""

import argparse
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from jobs import autostop, queue, slot
from jobs.queue import MARK
from jobs.slot import Slot
from jobs.worker import lower
from katherine import disk, gpu, runs, scratch
from katherine.errors import Busy, KatherineError, SetupError
from katherine.runs import Run, State
from katherine.settings import Home, child_environment

# How often the files are looked at and the ends of processes noticed, in seconds: a person sees no delay.
TICK = 0.2
# status.json is replaced at most twice a second: each is a round trip to a network volume, and no screen is faster.
SAVE = 0.5
# A reader knows by the heartbeat that a run on another machine lives (queue.SILENCE is twelve of these).
HEARTBEAT = 5.0
# From SIGTERM to SIGKILL: time to remove temporary files, not to save.
GRACE = 3.0
# How often it is looked for runs to begin while others are under way: on a slow volume each look takes a while.
BUSY = 2.0
# A worker that has said how it ended may still be closing a GPU's context; after this it hangs.
LEAVING = 30.0
# Two files of 8 MB are over 100,000 lines, and pass whole through a proxy that refuses 100 MB.
LOG_BYTES = 8_000_000
# A line longer than this is written in pieces, so that output without newlines is never held in memory.
LINE_BYTES = 64_000


class Log:
    """log.txt of a run: what the worker printed, with progress bars folded to their last state. At LOG_BYTES it
    becomes log.1.txt, and the one before it is dropped."""

    def __init__(self, path: Path, limit: int = LOG_BYTES):
        self._path = path
        self._limit = limit
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending = b""

    def write(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._put(_last_drawn(line) + b"\n")
        self._pending = _last_drawn(self._pending)
        if len(self._pending) > LINE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write out a line that has no end yet."""
        if self._pending:
            self._put(self._pending + b"\n")
            self._pending = b""

    def close(self) -> None:
        self.flush()
        self._file.close()

    def give_way(self) -> None:
        """Drop what has been logged, so that a full disk has room for the run's end."""
        with suppress(OSError):
            self._path.with_name("log.1.txt").unlink(missing_ok=True)
            self._file.truncate(0)

    def _put(self, line: bytes) -> None:
        # A log that cannot be written (the disk is full) must not end the run.
        with suppress(OSError):
            if self._size + len(line) > self._limit:
                self._path.replace(self._path.with_name("log.1.txt"))
                full, self._file = self._file, self._path.open("ab", buffering=0)
                full.close()
                self._size = 0
            self._size += self._file.write(line)


def _last_drawn(line: bytes) -> bytes:
    """What a terminal would show of a line that was drawn over and over from carriage returns."""
    whole = line.rstrip(b"\r")
    return whole[whole.rfind(b"\r") + 1 :]


class Supervision:
    """One run's worker, from its spawning to its end."""

    def __init__(self, home: Home, run: Run, held: Sequence[Slot], worker: str):
        self._run = run
        self._status = run.status()
        self._log = Log(run.log)
        self._log.write(f"--- attempt {self._status.attempt} begins, {runs.now()}\n".encode())
        self._report = b""
        self._end: dict[str, Any] | None = None
        self._killed: float | None = None
        self._leaving: float | None = None
        self._looked = self._saved = self._beaten = 0.0
        self._changed = True
        # One count a heartbeat, of the last minute: the counter is of the whole host, which may not be ours alone, and
        # a process with a hundred GB can take that long to die of it.
        self._oom_kills = deque([_oom_kills()], maxlen=12)
        kind = queue.worker_module(worker).KINDS.get(run.record.kind)
        environment = child_environment(
            *(kind.secrets if kind else ()),
            **{MARK: queue.marked(run), "KATHERINE_HOME": str(home.root)},
            PYTHONUNBUFFERED="1",  # what was printed before a crash is in the log
            PYTHONFAULTHANDLER="1",  # and so is where native code crashed
        )
        self._reading, writing = os.pipe()
        self._worker = subprocess.Popen(
            [
                *(sys.executable, "-m", worker, str(run.path), "--report", str(writing)),
                *("--supervisor", str(os.getpid()), "--gpus", *(each.name for each in held)),
            ],
            # It holds the slots as well: should this process be killed, nobody takes a GPU before the worker is dead.
            pass_fds=(writing, *(each.fileno() for each in held)),
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        os.close(writing)
        assert self._worker.stdout is not None
        self._pipes = selectors.DefaultSelector()
        for pipe, heard in ((self._reading, self._on_report), (self._worker.stdout.fileno(), self._log.write)):
            self._pipes.register(pipe, selectors.EVENT_READ, heard)
        self._status = replace(self._status, pid=self._worker.pid, pid_started=queue.ticks(self._worker.pid))

    def watch(self) -> None:
        """Returns when the worker and all it started are gone and the end is written."""
        while not self._over():
            self._listen(TICK)
            self._heed_stop()
            self._save_sometimes()
        # The worker is dead but not yet waited for, so its group's number cannot have passed to anybody else.
        self._signal(signal.SIGKILL)
        queue.end_leftovers(self._run, LEAVING)
        code = self._worker.wait()
        while self._listen(0):
            pass
        self._finish(code)

    def _over(self) -> bool:
        return os.waitid(os.P_PID, self._worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _listen(self, patience: float) -> bool:
        """Take in what the worker wrote. False if it wrote nothing for `patience` seconds."""
        if not self._pipes.get_map():
            # Both are closed, so that it is about to end: a moment, not a tick.
            time.sleep(patience / 10)
            return False
        ready = self._pipes.select(patience)
        for key, _ in ready:
            if data := os.read(key.fd, 1 << 16):
                key.data(data)
            else:
                self._pipes.unregister(key.fd)
        return bool(ready)

    def _on_report(self, data: bytes) -> None:
        *lines, self._report = (self._report + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "end" in message:
                self._end = message
                self._leaving = time.monotonic()
            if "phase" in message:
                self._status = replace(self._status, phase=message["phase"], phase_began=runs.now(), step=0, of=0)
            if "step" in message:
                self._status = replace(self._status, step=message["step"], of=message["of"])
            self._changed = True

    def _heed_stop(self) -> None:
        moment = time.monotonic()
        if moment - self._looked < TICK:
            return
        self._looked = moment
        try:
            request = queue.control(self._run).read_text()
        except OSError:
            request = ""
        if request and self._status.state is State.running:
            self._status = replace(self._status, state=State.stopping)
            self._changed = True
        if request == "kill" and self._killed is None:
            self._killed = moment
            self._signal(signal.SIGTERM)
        hanging = self._leaving is not None and moment - self._leaving > LEAVING
        if hanging or (self._killed is not None and moment - self._killed > GRACE):
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._worker.pid, number)

    def _save_sometimes(self) -> None:
        moment = time.monotonic()
        beat = moment - self._beaten >= HEARTBEAT
        if beat:
            self._beaten = moment
            self._oom_kills.append(_oom_kills())
        if beat or (self._changed and moment - self._saved >= SAVE):
            self._saved = moment
            self._changed = False
            self._status = replace(self._status, heartbeat=runs.now())
            # A full disk now may have room again at the end, and the worker will say so itself.
            with suppress(OSError):
                self._save()

    def _save(self) -> None:
        runs.write_json(self._run.path / "status.json", asdict(self._status))

    def _finish(self, code: int) -> None:
        state, reason, remedy = self._ending(code)
        self._log.flush()
        self._log.write(f"--- {state}, {runs.now()}. {reason}\n".encode(errors="replace"))
        self._status = replace(
            self._status, **queue.ended(state), heartbeat=runs.now(), exit_code=code, reason=reason, remedy=remedy
        )
        self._save_for_certain()
        # A killed worker cannot take its files with it, and what lies in memory is missed by everybody.
        scratch.sweep()
        self._log.close()
        self._pipes.close()
        os.close(self._reading)

    def _save_for_certain(self) -> None:
        """However long a full disk or a volume that is gone keeps it from being written: how a run has ended is not to
        be guessed later, and what builds on it waits for that."""
        for attempt in itertools.count():
            try:
                self._save()
                return
            except OSError as error:
                _report(f"the end of {self._run.id} cannot be written yet")
                if disk.is_full(error):
                    self._log.give_way()
                if attempt:
                    time.sleep(BUSY)

    def _ending(self, code: int) -> tuple[State, str, str]:
        """(state, reason, remedy). What the worker said counts for more than its exit code: a crash while closing
        down cannot undo a result that is written."""
        said = self._end["end"] if self._end else None
        at = f"at step {self._status.step}" if self._status.step else f"in phase {self._status.phase}"
        if said == "succeeded":
            return State.succeeded, "", ""
        if self._killed is not None:
            return State.cancelled, f"Stopped by you and killed {at}.", "Resume goes on from its newest checkpoint."
        if said == "stopped":
            return State.cancelled, f"Stopped by you; kept {at}.", "Resume continues from there."
        if self._end and said == "failed":
            return State.failed, self._end["reason"], self._end["remedy"]
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills[0]:
            return State.failed, f"Killed {at} by the host's memory limit.", lower(self._run, _MORE_MEMORY)
        if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            name = signal.Signals(-code).name
            return State.interrupted, f"Killed from outside ({name}) {at}.", "Resume it."
        if code < 0:
            name = signal.Signals(-code).name
            return State.failed, f"Native code crashed ({name}) {at}.", f"Where it did is in {self._run.log}."
        return State.failed, f"A bug: the worker left {at} with exit code {code}.", f"See {self._run.log}."


_MORE_MEMORY = "or take a machine with more memory"


def _oom_kills() -> int:
    """How many processes this kernel has killed for want of memory, by a container's limit or its own."""
    with suppress(OSError), open("/proc/vmstat") as counters:
        for line in counters:
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return 0


def _begin(home: Home, run: Run) -> bool:
    """Mark the run as under way, unless it was cancelled meanwhile."""
    with slot.mutex(home):
        status = run.status()
        if status.state is not State.queued:
            return False
        begun = runs.now()
        run.set_status(
            state=State.running,
            phase="starting",
            step=0,
            of=0,
            attempt=status.attempt + 1,
            supervisor=os.getpid(),
            supervisor_started=queue.ticks(os.getpid()),
            machine=queue.machine(),
            heartbeat=begun,
            started=begun,
            phase_began=begun,
            reason="",
            remedy="",
        )
        return True


class Crew:
    """The runs under way, each watched in a thread of its own, which spawns its worker too: the kernel takes a worker
    down with the thread that started it. ended: set whenever one has ended. last: the one that ended last."""

    def __init__(self, home: Home, worker: str):
        self._home = home
        self._worker = worker
        self._under_way: dict[str, Sequence[Slot]] = {}
        self.ended = threading.Event()
        self.last: Run | None = None

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def holds(self, cards: Sequence[str]) -> bool:
        """Whether all of these GPUs are its runs'."""
        return set(cards) <= {each.name for held in list(self._under_way.values()) for each in held}

    def carry_out(self, run: Run, held: Sequence[Slot]) -> None:
        """Returns at once. The slots are let go when the run has ended."""
        self._under_way[run.id] = held
        threading.Thread(target=self._watch, args=(run, held), name=run.id).start()

    def _watch(self, run: Run, held: Sequence[Slot]) -> None:
        try:
            Supervision(self._home, run, held, self._worker).watch()
        except Exception as error:
            # The others go on.
            _report(f"{run.id} cannot be watched any longer")
            self._give_up(run, f"It could not be watched any longer ({type(error).__name__}: {error}).")
        finally:
            for each in held:
                each.release()
            self.last = run
            del self._under_way[run.id]
            self.ended.set()

    def _give_up(self, run: Run, why: str) -> None:
        """However long a full disk or a volume that is gone keeps it from being written: while this process lives,
        nobody else may say that the run has ended."""
        while True:
            try:
                queue.give_up(self._home, run, why)
                return
            except (OSError, KatherineError):
                _report(f"{run.id} cannot be given up yet")
                time.sleep(BUSY)


def drain(home: Home, place: socket.socket, worker: str) -> None:
    """Carry out queued runs, oldest first, one on each GPU, until none can begin; then give the supervisor's place up,
    and leave it to autostop whether the pod is needed any longer."""
    crew = Crew(home, worker)
    try:
        _carry_out_all(home, place, crew, worker)
    finally:
        # Also where the queue could not be read at the last: nobody may come to see it.
        if crew.last is not None:
            try:
                autostop.begin(home, crew.last.id)
            except OSError as error:
                print(f"{runs.now()} auto-stop could not begin: {error}", file=sys.stderr)


def _carry_out_all(home: Home, place: socket.socket, crew: Crew, worker: str) -> None:
    while True:
        # What ends from here on is noticed at once, however long it is waited for.
        crew.ended.clear()
        try:
            # Anew each time: a driver that did not answer at first may by now.
            cards = gpu.usable()
            if crew.holds(cards):
                crew.ended.wait(BUSY)
                continue
            with slot.mutex(home):
                run = queue.next_runnable(home)
                if run is None and not crew:
                    # Given up under the mutex: whoever queues a run next finds the place free and starts a supervisor.
                    place.close()
                    return
            if run is not None:
                _start(home, run, cards, crew, worker)
        except Exception:
            # A disk that is full or gone, a folder that cannot be read. What is under way must be watched. Whoever
            # waits may start another supervisor, once this one is watching nobody.
            if not crew:
                raise
            _report("the queue cannot be read")
            run = None
        if run is None:
            crew.ended.wait(BUSY)


def _start(home: Home, run: Run, cards: Sequence[str], crew: Crew, worker: str) -> None:
    """Hand the run to the crew with a GPU, or say why it has to wait."""
    try:
        held = [slot.take_one(home, run.record.kind, cards, run=run.id)]
    except Busy:
        soon = " Chat gives way within about a minute." if slot.chatting(home, cards) else ""
        _say_why_waiting(home, run, f"{slot.held_by(home, cards)}.{soon}")
        crew.ended.wait(SAVE)
        return
    begun = False
    try:
        if len(cards) > 1 and _spreads(home, run, worker):
            held += _idle(home, cards, held[0].name, run)
        # The last that can fail: what is under way must have a worker.
        begun = _begin(home, run)
    finally:
        if not begun:
            for each in held:
                each.release()
    if begun:
        crew.carry_out(run, held)


def _spreads(home: Home, run: Run, worker: str) -> bool:
    kind = queue.worker_module(worker).KINDS.get(run.record.kind)
    try:
        return kind is not None and kind.spreads(home, run.record.recipe)
    except Exception:
        # A base whose files make no sense: the worker will say so, and the runs behind this one go on.
        _report(f"{run.id} is not shared by several GPUs, since nobody knows whether it can be")
        return False


def _idle(home: Home, cards: Sequence[str], first: str, run: Run) -> list[Slot]:
    """GPUs like the first that nobody has and no other run waits for, taken for the run as well."""
    if any(other.id != run.id for other in queue.waiting(home)):
        return []
    found: list[Slot] = []
    try:
        mine = gpu.of(first)
        for name in slot.free(home, cards):
            card = gpu.of(name)
            # Slices of one card are no GPUs of their own to NCCL, and unlike cards would not lay the step out alike.
            like = mine and card and (card.name, card.memory_total) == (mine.name, mine.memory_total)
            if mine and card and like and card.index != mine.index:
                with suppress(Busy):
                    found.append(slot.take(home, run.record.kind, run=run.id, name=name))
    except SetupError:
        pass  # a driver that does not answer: the run will say so
    return found


def _report(what: str) -> None:
    # The disk that this goes to may be what failed.
    with suppress(OSError):
        print(f"{runs.now()} {what}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def _say_why_waiting(home: Home, run: Run, why: str) -> None:
    with slot.mutex(home):
        status = run.status()
        if status.state is State.queued and status.reason != why:
            run.set_status(reason=why)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Drain the queue of runs; started by jobs.queue.")
    arguments.add_argument("--home", type=Path, required=True)
    arguments.add_argument("--worker", default=queue.WORKER, help="module that carries out a run")
    arguments.add_argument("--place", type=int, help="descriptor that already holds the supervisor's place")
    asked = arguments.parse_args()
    home = Home(asked.home.absolute())
    place = slot.bind(home, "supervisor") if asked.place is None else socket.socket(fileno=asked.place)
    if place is not None:
        place.set_inheritable(False)
        drain(home, place, asked.worker)


if __name__ == "__main__":
    main()
