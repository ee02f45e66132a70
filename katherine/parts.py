"""The parts of a stage, of which several may be at work at once: what each took, and one progress of them all. What
they do, and when one begins, is the stage's business."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from katherine.progress import Progress, Stopped


class Parts:
    """`seconds`: part → its own wall time, by when it ended. Parts that overlap add up to more than the stage took."""

    def __init__(self, progress: Progress):
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._at_work: dict[str, Part] = {}
        self._given_up = threading.Event()
        # Parts report from threads of their own, and what they report to need not bear that.
        self._lock = threading.RLock()

    @contextmanager
    def part(self, name: str) -> Iterator["Part"]:
        """A part is at work within it; what is yielded is its Progress. `name` is "work" or "work thing", as in
        "quantise q4_k_m". Raises Stopped where the stage is to stop."""
        if self.stop_requested():
            raise Stopped
        part = Part(self)
        begun = time.monotonic()
        with self._lock:
            self._at_work[name] = part
            self._tell()
        try:
            yield part
            self.seconds[name] = round(time.monotonic() - begun, 3)
        finally:
            with self._lock:
                del self._at_work[name]
                if self._at_work:
                    self._tell()

    def say(self, text: str) -> None:
        with self._lock:
            self._progress.say(text)

    def stop_requested(self) -> bool:
        return self._given_up.is_set() or self._progress.stop_requested()

    def give_up(self) -> None:
        """From now on every part is asked to stop."""
        self._given_up.set()

    def _tell(self) -> None:
        self._progress.phase(named(list(self._at_work)))
        self._step()

    def _step(self) -> None:
        """One part tells its own steps. Of several, what is told is the hundredths of their work that are done, each
        part for as much as another."""
        each = list(self._at_work.values())
        if len(each) == 1:
            done, of = each[0].done, each[0].of
        else:
            done, of = round(100 * sum(part.done / part.of if part.of else 0.0 for part in each) / len(each)), 100
        if of:
            self._progress.step(done, of)


class Part:
    """The Progress of one part."""

    def __init__(self, parts: Parts):
        self.done, self.of = 0, 0
        self._parts = parts

    def phase(self, name: str) -> None:
        """A part has none of its own."""

    def step(self, step: int, of: int) -> None:
        with self._parts._lock:
            self.done, self.of = step, of
            self._parts._step()

    def metric(self, **values: float | int | str | None) -> None:
        with self._parts._lock:
            self._parts._progress.metric(**values)

    def say(self, text: str) -> None:
        self._parts.say(text)

    def stop_requested(self) -> bool:
        return self._parts.stop_requested()


def named(parts: list[str]) -> str:
    """Those at work in a few words: "quantise q4_k_m, q5_k_m; check bf16"."""
    things: dict[str, list[str]] = {}
    for part in parts:
        work, _, thing = part.partition(" ")
        things.setdefault(work, []).extend([thing] * bool(thing))
    return "; ".join(f"{work} {', '.join(found)}".strip() for work, found in things.items())
