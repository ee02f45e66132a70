"""What the GPUs do over time: a thread that reads them every two seconds, the last minutes of it, and what the figures
mean when they look wrong. Reading one moment is gpu's."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType

from katherine import gpu
from katherine.errors import SetupError
from katherine.gpu import GpuReading

# NVML's figures are of the last second or less. A reading takes 16 ms on an H200 (90 ms the first time).
EVERY = 2.0
KEPT_SECONDS = 300.0
# Full load at under 30% of the power limit, for a minute: by itself a training that keeps a card busy draws 590 to 690
# of an H200's 700 W, so that somebody else is busy on it.
SPELL = 60.0
LOW_POWER = 0.30
# An H200 that multiplies matrices without a pause reads 99 as often as 100.
FULL_LOAD = 98
# After three readings that did not come, what happened meanwhile is not known.
GAP = 3 * EVERY + 1.0
# A step's peak is above what a reading catches between two steps; so near the end the next longer batch fails.
MEMORY_TIGHT = 0.97


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at all cards. at: seconds on the monotonic clock. error: what is wrong with the driver, else "".
    in_use: the cards, by index, that a run, or a chat, of ours held."""

    at: float
    cards: tuple[GpuReading, ...] = ()
    error: str = ""
    in_use: frozenset[int] = frozenset()


class Watch:
    """Reads the GPUs in a thread of its own between start() and stop(), or in a `with`. Safe to ask from several
    threads. in_use: tells whether ours is the work on the card of that index."""

    def __init__(
        self,
        in_use: Callable[[int], bool] = lambda index: False,
        read: Callable[[], list[GpuReading]] = gpu.read,
        every: float = EVERY,
    ):
        self._in_use = in_use
        self._read = read
        self._every = every
        self._readings: deque[Reading] = deque(maxlen=round(KEPT_SECONDS / EVERY))
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read; a second start changes nothing."""
        with self._lock:
            if self._thread is None:
                self._ended = threading.Event()
                # A daemon: a driver that hangs in a call must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, args=(self._ended,), name="telemetry", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
            self._ended.set()
        if thread is not None:
            # Long enough for a reading under way; a driver that hangs is left to hang.
            thread.join(1.0)

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def latest(self) -> Reading | None:
        """The newest reading; None before the first. One that is old says that the driver has stopped answering."""
        with self._lock:
            newest = self._readings[-1] if self._readings else None
        if newest is None or newest.error or not newest.cards:
            return newest
        silent = time.monotonic() - newest.at
        if self._thread is not None and silent > max(GAP, 3 * self._every):
            return replace(
                newest, cards=(), error=f"The NVIDIA driver has not answered for {silent:.0f} s. Restart the machine."
            )
        return newest

    def history(self) -> list[Reading]:
        """The last minutes, oldest first."""
        with self._lock:
            return list(self._readings)

    def _run(self, ended: threading.Event) -> None:
        while True:
            reading = self._look()
            with self._lock:
                if ended.is_set():
                    return
                self._readings.append(reading)
            if ended.wait(self._every):
                return

    def _look(self) -> Reading:
        try:
            cards = tuple(self._read())
            in_use = frozenset(card.index for card in cards if self._in_use(card.index))
            return Reading(time.monotonic(), cards, in_use=in_use)
        except SetupError as unwell:
            return Reading(time.monotonic(), error=str(unwell))
        except Exception as bug:
            # A thread that dies would look like a driver that hangs.
            return Reading(time.monotonic(), error=f"The GPU could not be read ({type(bug).__name__}: {bug}).")


def diagnosis(readings: Sequence[Reading]) -> str | None:
    """What is wrong with a GPU, in a sentence or two, or None: nothing, or too little is known. `readings` are the last
    minutes, oldest first."""
    spell = _last_spell(readings)
    if spell is None:
        return None
    for index in {card.index: None for card in spell[-1].cards}:
        cards = [card for reading in spell for card in reading.cards if card.index == index]
        if len(cards) == len(spell) and (found := _diagnosed(cards, [index in each.in_use for each in spell])):
            return found
    return None


def _last_spell(readings: Sequence[Reading]) -> list[Reading] | None:
    """The readings of the last SPELL seconds, or None where they do not reach so far or have a gap."""
    if not readings:
        return None
    end = readings[-1].at
    # The one before the spell as well, so that it is covered from its beginning.
    first = max((i for i, reading in enumerate(readings) if reading.at <= end - SPELL), default=None)
    if first is None:
        return None
    spell = list(readings[first:])
    if any(b.at - a.at > GAP for a, b in pairwise(spell)) or any(reading.error for reading in spell):
        return None
    return spell


def _diagnosed(cards: list[GpuReading], in_use: list[bool]) -> str | None:
    if any(card.utilisation is None or card.utilisation < FULL_LOAD for card in cards):
        return None
    name = cards[-1].name
    if not any(in_use):
        return (
            f"The {name} has been busy for a minute, though nothing of this panel runs on it: another program, or "
            "another tenant of a shared pod. A run started now would be slow."
        )
    shares = [card.power / card.power_limit for card in cards if card.power is not None and card.power_limit]
    if len(shares) < len(cards) or max(shares) >= LOW_POWER or not all(in_use):
        return None
    watts = f"{cards[-1].power:.0f} of {cards[-1].power_limit:.0f} W"
    return (
        f"This pod looks shared: the {name} is 100% busy but draws only {watts}. Another tenant may be taking its "
        "memory bandwidth, which slows a run 3 to 5 times. Secure Cloud pods are not shared."
    )


def memory_tight(card: GpuReading) -> bool:
    """Whether so little memory is left that a longer batch may not fit."""
    return bool(
        card.memory_total and card.memory_used is not None and card.memory_used > MEMORY_TIGHT * card.memory_total
    )
