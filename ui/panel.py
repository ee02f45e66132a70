"""What the tabs are given, and what they give back. Holds no state of a visitor: pages are rebuilt from files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from katherine.history import History
from katherine.settings import Home


@dataclass(frozen=True, slots=True)
class Panel:
    """home: where everything lies. history: its runs, read cheaply."""

    home: Home
    history: History

    @classmethod
    def of(cls, home: Home) -> "Panel":
        return cls(home, History(home))


@dataclass(frozen=True, slots=True)
class Live:
    """How a tab stays true: `refresh(*inputs)` gives the values of `outputs` (a dict of component → value, or one
    value each), gr.skip() where nothing changed. Called when the tab is opened, and every `every` seconds while it is
    (None: only when opened). It takes under a second, and shifts nothing on the page."""

    refresh: Callable[..., Any]
    outputs: Sequence[Any]
    inputs: Sequence[Any] = field(default=())
    every: float | None = None
