"""Stopping the pod when the queue has run empty: the setting, the countdown as a process of its own, which needs no
browser and no web process, and its state on disk. The stop itself is pod's; when to begin is the supervisor's and the
pool's to say.

    KATHERINE_HOME/autostop/   settings.json  state.json  cancel.json  log.txt
"""

import argparse
import json
import os
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from jobs import detached, errands, queue, slot
from katherine import disk, gpu, pod, runs, units
from katherine.errors import KatherineError, PodError
from katherine.history import History
from katherine.runs import State
from katherine.settings import Home

# Time to see it on a telephone and press the button; at the price of an H200, 70 cents.
MINUTES = 10.0
FEWEST_MINUTES, MOST_MINUTES = 1.0, 720.0
# How often a countdown looks whether it still holds, in seconds.
LOOK = 1.0
# A network or a host that is down for a moment is asked again: three times, a minute apart.
RETRIES = 3
RETRY_SECONDS = 60.0
# RunPod stops a pod within seconds of accepting. One that still runs after this was not stopped.
STOPPING_SECONDS = 300.0
# How long it is said who or what kept the pod running.
NEWS_SECONDS = 600.0
# The flush before the stop; a volume that hangs must not keep the pod running for ever.
FLUSH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """minutes: how long is counted down. retry_seconds, stopping_seconds: how long after a failed request it is made
    again, and how long the pod may take to end once the stop is accepted."""

    enabled: bool = False
    minutes: float = MINUTES
    retry_seconds: float = RETRY_SECONDS
    stopping_seconds: float = STOPPING_SECONDS


class Phase(StrEnum):
    """off and waiting are the setting's; the others those of the last countdown, while they still matter."""

    off = "off"
    waiting = "waiting"
    counting = "counting"
    stopping = "stopping"
    accepted = "accepted"
    cancelled = "cancelled"
    refused = "refused"
    lost = "lost"


# What a person must be told until they say that they have seen it: the pod goes on costing money.
LOUD = frozenset({Phase.refused, Phase.lost})
_UNDER_WAY = frozenset({Phase.counting, Phase.stopping, Phase.accepted})


@dataclass(frozen=True, slots=True)
class Countdown:
    """One countdown as its process writes it down. since: when it came to its phase, ISO 8601, UTC. deadline: seconds
    on this machine's monotonic clock, which no change of the time of day moves; at: the same moment as a time of day,
    for people."""

    id: str
    phase: Phase
    reason: str
    since: str
    deadline: float
    at: str
    pid: int
    pid_started: int | None
    machine: str
    seen: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """What a page shows. left: seconds until the stop, while it is counting. reason: in words. can_cancel: whether
    cancel() would change anything."""

    phase: Phase
    minutes: float
    reason: str = ""
    left: float | None = None

    @property
    def can_cancel(self) -> bool:
        return self.phase in (Phase.counting, Phase.stopping)

    @property
    def loud(self) -> bool:
        return self.phase in LOUD


def folder(home: Home) -> Path:
    return home.root / "autostop"


# ------------------------------------------------------------------------------------------------------- the setting


def settings(home: Home) -> Settings:
    """The setting; a missing or damaged one is off, since stopping a pod unasked is the worse mistake."""
    try:
        raw = json.loads((folder(home) / "settings.json").read_bytes())
        found = Settings(**{name: raw[name] for name in raw if name in {f.name for f in fields(Settings)}})
        numbers = found.minutes, found.retry_seconds, found.stopping_seconds
        sound = isinstance(found.enabled, bool) and min(numbers) > 0 and max(numbers) <= MOST_MINUTES
        return found if sound else Settings()
    except (OSError, ValueError, TypeError):
        return Settings()


def configure(home: Home, enabled: bool, minutes: float | None = None) -> Settings:
    """Turn it on or off. Off is never refused, and also ends a countdown. On raises KatherineError where it could not
    work: no pod, a home that a stop would wipe, no key, or minutes that nobody could mean."""
    now = settings(home)
    minutes = now.minutes if minutes is None or not enabled else minutes
    if enabled and not FEWEST_MINUTES <= minutes <= MOST_MINUTES:
        raise KatherineError(f"Give {FEWEST_MINUTES:.0f} to {MOST_MINUTES:.0f} minutes for the countdown.")
    if enabled and (why := impossible(home)):
        raise KatherineError(why)
    folder(home).mkdir(parents=True, exist_ok=True)
    changed = replace(now, enabled=enabled, minutes=float(minutes))
    runs.write_json(folder(home) / "settings.json", asdict(changed))
    return changed


def impossible(home: Home) -> str:
    """Why this machine cannot be stopped from here, or "" where it can."""
    if pod.here() is None:
        return "This machine is not a RunPod pod (RUNPOD_POD_ID is not set): there is nothing to stop."
    if not disk.outlives_a_stop(home.root):
        return (
            f"{home.root} lies on the container's own disk, which a stop wipes: the results would be lost. "
            f"Set KATHERINE_HOME to a folder on the volume, such as {pod.VOLUME}/katherine. If this is a volume after "
            "all, set KATHERINE_VOLUME to where it begins."
        )
    if not pod.has_key():
        return f"{pod.KEY} is not in the environment: start the panel where the pod's own variables are set."
    return ""


# ----------------------------------------------------------------------------------------------- what a page asks for


def view(home: Home) -> View:
    """Where auto-stop stands now. Cheap: two small files."""
    chosen, countdown = settings(home), _read(home)
    quiet = View(Phase.waiting if chosen.enabled else Phase.off, chosen.minutes)
    if countdown is None or countdown.seen or countdown.machine != queue.machine():
        # Another boot's countdown is history: either the pod was stopped by it, or something else came first.
        return quiet
    if countdown.phase is Phase.cancelled and (not chosen.enabled or _age(countdown) > NEWS_SECONDS):
        return quiet
    if countdown.phase in _UNDER_WAY and not _is_alive(countdown):
        return View(
            Phase.lost,
            chosen.minutes,
            "Auto-stop was not carried out: its process ended. The pod runs on, and costs money.",
        )
    left = max(countdown.deadline - time.monotonic(), 0.0) if countdown.phase is Phase.counting else None
    return View(countdown.phase, chosen.minutes, countdown.reason, left)


def words(shown: View) -> str:
    """The view as a sentence or two."""
    match shown.phase:
        case Phase.off:
            return "Auto-stop is off."
        case Phase.waiting:
            return f"Auto-stop is on: this pod stops {_minutes(shown)} after the queue has run empty."
        case Phase.counting:
            return f"Stopping this pod in {units.duration(round(shown.left or 0))}. {shown.reason}"
        case Phase.cancelled:
            return f"Not stopping this pod. {shown.reason}"
        case Phase.refused:
            return f"Auto-stop failed. {shown.reason}"
        case _:
            return shown.reason


def _minutes(shown: View) -> str:
    return units.duration(shown.minutes * 60)


def cancel(home: Home, who: str) -> View:
    """Keep the pod running: ends a countdown, whoever asks. Raises KatherineError where there is none."""
    countdown = _read(home)
    if countdown is None or not view(home).can_cancel:
        raise KatherineError("Auto-stop is not counting down: there is nothing to cancel.")
    try:
        # By its id, so that a cancel that comes late does not end the next countdown.
        runs.write_json(folder(home) / "cancel.json", {"id": countdown.id, "who": who})
    except OSError:
        # A full disk must not stop anybody from keeping the pod.
        if _is_alive(countdown):
            os.kill(countdown.pid, signal.SIGTERM)
    # Its process looks five times a second; so who asked sees the answer.
    patience = time.monotonic() + 0.8
    while view(home).can_cancel and time.monotonic() < patience:
        time.sleep(0.05)
    return view(home)


def acknowledge(home: Home) -> None:
    """Somebody has seen how the last countdown ended: it is not shown any more."""
    countdown = _read(home)
    if countdown is not None and (countdown.phase not in _UNDER_WAY or not _is_alive(countdown)):
        runs.write_json(folder(home) / "state.json", asdict(replace(countdown, seen=True)))


# ------------------------------------------------------------------------------------------------------ the countdown


def begin(home: Home, after: str) -> bool:
    """Called when the queue has run empty after run `after`, or a chat has ended ("chat"): starts the countdown, if
    that is wanted on this machine and none is under way. Returns whether it started one."""
    if not settings(home).enabled or pod.here() is None:
        return False
    place = slot.bind(home, "autostop")
    if place is None:
        return False
    with place:
        folder(home).mkdir(parents=True, exist_ok=True)
        arguments = ["--home", str(home.root.absolute()), "--after", after]
        detached.start(home, place, "jobs.autostop", arguments, folder(home) / "log.txt", pod.KEY)
    return True


class _Cancelled(Exception):
    """Why the pod is not stopped after all, in words."""


class _Count:
    """The countdown's own process."""

    def __init__(self, home: Home, after: str):
        self._home = home
        self._history = History(home)
        self._chosen = settings(home)
        seconds = self._chosen.minutes * 60
        pid = os.getpid()
        self._written = Countdown(
            id=secrets.token_hex(8),
            phase=Phase.counting,
            reason=_ending(home, after),
            since=runs.now(),
            deadline=time.monotonic() + seconds,
            at=(datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds"),
            pid=pid,
            pid_started=queue.ticks(pid),
            machine=queue.machine(),
        )

    def run(self) -> None:
        # Where it cannot be written down, nobody could see or cancel it: then the error ends it, and the log has it.
        self._write()
        if why := impossible(self._home):
            self._write(Phase.refused, f"This pod is not stopped, and goes on costing money. {why}")
            return
        try:
            self._wait_until(self._written.deadline)
            self._stop()
        except _Cancelled as why:
            self._write(Phase.cancelled, str(why))
        except KatherineError as error:
            self._write(Phase.refused, str(error))

    def _stop(self) -> None:
        _flush()
        this = pod.here()
        assert this is not None  # else impossible() had said so
        self._check()
        self._write(Phase.stopping, "RunPod is asked to stop this pod.")
        for retries in range(RETRIES, -1, -1):
            try:
                pod.stop(this.id)
                break
            except PodError as error:
                if not error.passing or not retries:
                    raise
                self._say(f"{error} Asked again in {self._chosen.retry_seconds:.0f} s.")
                self._write(Phase.stopping, f"{error} It is asked again, up to {retries} more times.")
                self._wait_until(time.monotonic() + self._chosen.retry_seconds)
        self._write(Phase.accepted, "RunPod has accepted: this pod ends within seconds.")
        time.sleep(self._chosen.stopping_seconds)
        raise KatherineError(
            f"RunPod accepted to stop this pod {self._chosen.stopping_seconds:.0f} s ago, and it still runs. "
            "Stop it yourself in RunPod's console: it goes on costing money."
        )

    def _wait_until(self, deadline: float) -> None:
        looked = 0.0
        while (left := deadline - time.monotonic()) > 0:
            self._heed_cancel()
            if time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                self._check()
            time.sleep(min(left, LOOK / 5))
        self._check()

    def _check(self) -> None:
        """Raises _Cancelled where there is a reason not to stop, whoever or whatever brought it."""
        self._heed_cancel()
        if not settings(self._home).enabled:
            raise _Cancelled("Auto-stop was turned off.")
        for seen in self._history.under_way():
            if seen.status.state is not State.queued:
                raise _Cancelled(f"Run {seen.id} began: the pod is in use.")
            # One that waits for somebody to resume its parent may wait for ever, at the pod's price.
            if not queue.blocked(self._home, seen.run):
                raise _Cancelled(f"Run {seen.id} was queued: the pod is in use.")
        # What is loaded to chat with was used within the last minutes: the pool unloads it otherwise.
        if slot.chatting(self._home, gpu.usable()):
            raise _Cancelled("Somebody is chatting: the pod is in use.")
        if busy := errands.under_way(self._home):
            raise _Cancelled(f"Errand {busy[0].id} is under way: the pod is in use.")

    def _heed_cancel(self) -> None:
        try:
            asked = json.loads((folder(self._home) / "cancel.json").read_bytes())
        except (OSError, ValueError):
            return
        if isinstance(asked, dict) and asked.get("id") == self._written.id:
            raise _Cancelled(f"Kept running by {asked.get('who') or 'somebody'}.")

    def _write(self, phase: Phase | None = None, reason: str | None = None) -> None:
        if phase is not None:
            self._written = replace(self._written, phase=phase, reason=reason or "", since=runs.now())
        self._say(f"{self._written.phase}: {self._written.reason}")
        runs.write_json(folder(self._home) / "state.json", asdict(self._written))

    def _say(self, text: str) -> None:
        print(f"{runs.now()} {text}", flush=True)


def _ending(home: Home, after: str) -> str:
    """Why it is counting: the queue is empty, and how the last run ended, which may not be what was hoped for."""
    waiting = ""
    with suppress(OSError):
        count = len([run for run, status in queue.unfinished(home) if status.state is State.queued])
        waiting = f", except {count} that wait for an interrupted run to be resumed" if count else ""
    try:
        status = runs.load(home, after).status()
    except KatherineError:
        return f"The queue is empty{waiting}."
    why = f" ({status.reason.rstrip('.')})" if status.reason and status.state is not State.succeeded else ""
    return f"The queue is empty{waiting}; the last run, {after}, {_ENDED.get(status.state, 'ended')}{why}."


_ENDED = {
    State.succeeded: "succeeded",
    State.failed: "FAILED",
    State.cancelled: "was stopped",
    State.interrupted: "was interrupted",
}


def _flush() -> None:
    """Have the kernel write out what it holds back, as far as it does within FLUSH_SECONDS."""
    writing = threading.Thread(target=os.sync, daemon=True)
    writing.start()
    writing.join(FLUSH_SECONDS)


def _read(home: Home) -> Countdown | None:
    try:
        raw: dict[str, Any] = json.loads((folder(home) / "state.json").read_bytes())
        known = {f.name for f in fields(Countdown)}
        return Countdown(**{k: v for k, v in raw.items() if k in known} | {"phase": Phase(raw["phase"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _age(countdown: Countdown) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(countdown.since)).total_seconds()


def _is_alive(countdown: Countdown) -> bool:
    return queue.ticks(countdown.pid) == countdown.pid_started is not None


def main() -> None:
    arguments = argparse.ArgumentParser(description="Count down to the pod's stop; started by jobs.")
    arguments.add_argument("--home", type=Path, required=True)
    arguments.add_argument("--after", required=True, help="the run after which the queue was empty, or chat")
    arguments.add_argument("--place", type=int, required=True, help="descriptor that holds the countdown's place")
    asked = arguments.parse_args()
    with socket.socket(fileno=asked.place) as place:
        place.set_inheritable(False)
        _Count(Home(asked.home.absolute()), asked.after).run()


if __name__ == "__main__":
    main()
