"""What the tabs are given, and what they give back. Holds no state of a visitor: pages are rebuilt from files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import slot
from jobs.asking import Asking
from jobs.pool import Pool
from katherine.curves import Cache
from katherine.history import History
from katherine.rendering import Renderer
from katherine.settings import Home
from katherine.telemetry import Watch


@dataclass(frozen=True, slots=True)
class Panel:
    """home: where everything lies. history: its runs, read cheaply. watch: the GPUs, read while the server runs.
    renderer: examples as training sees them. pool: the engines that are loaded. asking: talks that are being answered.
    curves: runs' metrics, each row read once."""

    home: Home
    history: History
    watch: Watch
    renderer: Renderer
    pool: Pool
    asking: Asking
    curves: Cache = field(default_factory=Cache)

    @classmethod
    def of(cls, home: Home) -> "Panel":
        renderer, pool = Renderer(home), Pool(home)
        watch = Watch(in_use=lambda index: not slot.free(home, [str(index)]))
        return cls(home, History(home), watch, renderer, pool, Asking(home, pool, renderer))


@dataclass(frozen=True, slots=True)
class Live:
    """How a tab stays true: `refresh(*inputs)` gives the values of `outputs` (a dict of component → value, or one
    value each), gr.skip() where nothing changed. Called when the tab is opened, and every `every` seconds while it is
    (None: only when opened). It takes under a second, and shifts nothing on the page."""

    refresh: Callable[..., Any]
    outputs: Sequence[Any]
    inputs: Sequence[Any] = field(default=())
    every: float | None = None
