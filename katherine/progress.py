"""How a stage tells the world where it is. Stages take a Progress and never print, so that the same code
serves a run folder, a test and a terminal."""

from typing import Protocol


class Progress(Protocol):
    def phase(self, name: str) -> None:
        """A new part of the work begins; steps start again at 0."""

    def step(self, step: int, of: int) -> None:
        """`step` of `of` units of the present phase are done."""

    def metric(self, **values: float | int | str | None) -> None:
        """One logged row, as it happens. A zero is a value; None is absent."""

    def say(self, text: str) -> None:
        """One line for the log."""

    def stop_requested(self) -> bool:
        """True once somebody asked for stop-and-keep: save, then raise Stopped."""


class Stopped(Exception):
    """Raised by a stage after it has kept what it can, because stop_requested() was true. Not an error."""


class Quiet:
    """A Progress that keeps what it is told in memory; for tests and for stages called from Python."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.rows: list[dict] = []
        self.lines: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, of: int) -> None:
        pass

    def metric(self, **values: float | int | str | None) -> None:
        self.rows.append(values)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stop_requested(self) -> bool:
        return False
