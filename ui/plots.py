"""What is drawn of runs' curves: plotly figures as plain data, small enough to be sent every two seconds. Reading and
thinning is katherine.curves', showing and zooming ui.figure's."""

import base64
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from katherine import curves
from katherine.curves import Curves, Floats, Series, Steps

# All figures of one refresh together, as JSON: the page may ask every two seconds, over a phone's connection.
BUDGET_BYTES = 52_000
# Name, colour, line and the like of one trace; axes and titles of one figure. Measured, and rounded up.
TRACE_BYTES = 270
FIGURE_BYTES = 520
# More points than pixels show nothing; with fewer a curve no longer is one.
MOST_POINTS, LEAST_POINTS = 1_000, 40
# So many past runs can be told apart, by colour and by dash, and fit the budget.
MOST_PAST = 6
# An isolated value has no line to it, and few values are easier read as points.
FEW = 30

# Okabe and Ito's colours, which the colour-blind tell apart, as dark or light as gives each at least 3:1 on both of the
# page's backgrounds.
BLUE, ORANGE, GREEN, PURPLE = "#2b87d1", "#d97706", "#0f9d76", "#b565a7"
# Past runs: muted, and told apart by their dashes as well.
PAST = ("#8a8f98", "#a2845e", "#6f8fa8", "#8f8a5c", "#9a7f95", "#6f9488")
DASHES = ("dot", "dash", "dashdot", "longdash", "longdashdot", "3px,2px")


@dataclass(frozen=True, slots=True)
class Line:
    """One value that is drawn. column: of the steps; evaluated: of the held-out share, or empty."""

    column: str
    label: str
    colour: str
    evaluated: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure. smoothed: whether the slider acts on it; what has no noise is drawn as it is. laid_over: whether past
    runs are drawn in it. tick: a d3 format of the y axis."""

    name: str
    title: str
    lines: tuple[Line, ...]
    smoothed: bool = True
    laid_over: bool = True
    tick: str = ""


_BOTH = (
    Plot("learning_rate", "Learning rate", (Line("learning_rate", "learning rate", BLUE),), smoothed=False, tick=".1e"),
    Plot("grad_norm", "Gradient norm", (Line("grad_norm", "gradient norm", BLUE),)),
    Plot("speed", "Tokens per second", (Line("tokens_per_second", "tokens per second", BLUE),), laid_over=False),
    Plot(
        "memory", "Most memory, GiB", (Line("memory_gib", "most memory, GiB", BLUE),), smoothed=False, laid_over=False
    ),
)
_LOSS = Plot("loss", "Loss", (Line("loss", "loss", BLUE, "eval_loss"),))
PLOTS: dict[str, tuple[Plot, ...]] = {
    "sft": (_LOSS, *_BOTH),
    "dpo": (
        _LOSS,
        Plot("margin", "Margin: chosen less rejected", (Line("margin", "margin", BLUE, "eval_margin"),)),
        Plot(
            "accuracy",
            "Accuracy: pairs where chosen wins",
            (Line("accuracy", "accuracy", BLUE, "eval_accuracy"),),
        ),
        Plot(
            "rewards",
            "Rewards",
            (
                Line("reward_chosen", "chosen", BLUE, "eval_reward_chosen"),
                Line("reward_rejected", "rejected", ORANGE, "eval_reward_rejected"),
            ),
        ),
        *_BOTH,
    ),
}
# DPO has all that SFT has.
NAMES = tuple(plot.name for plot in PLOTS["dpo"])


@dataclass(frozen=True, slots=True)
class Shown:
    """A run as it is drawn."""

    id: str
    label: str
    curves: Curves


def mark(kind: str, main: Shown, past: Sequence[Shown], weight: float) -> str:
    """Changes whenever draw()'s answer would."""
    seen = [f"{run.id}@{run.curves.mark}" for run in (main, *past[:MOST_PAST])]
    return " ".join([kind, f"{weight:.3f}", *seen])


def draw(kind: str, main: Shown, past: Sequence[Shown] = (), weight: float = 0.0) -> dict[str, dict[str, Any] | None]:
    """The figures of a run of this kind by name, None where nothing has been logged; past runs are laid over. weight:
    of the smoothing, from 0 (none) to under 1.

    A spike that one step made is drawn however long the run is. The whole is under 60 KB as JSON."""
    plots = PLOTS.get(kind, ())
    past = past[:MOST_PAST]
    parts = {plot.name: list(_parts(plot, main, past, weight)) for plot in plots}
    count = sum(map(len, parts.values()))
    wide = max((len(part.steps) and int(part.steps[-1]) for each in parts.values() for part in each), default=0)
    room = BUDGET_BYTES - TRACE_BYTES * count - FIGURE_BYTES * len(plots)
    points = int(np.clip(room // max(count, 1) // _point_bytes(wide), LEAST_POINTS, MOST_POINTS))
    return {plot.name: _figure(plot, main, parts[plot.name], points) for plot in plots}


def odd(kind: str, main: Shown, most: int = 5) -> list[str]:
    """In words, what is not drawn since it is no finite number: "gradient norm at steps 12 and 13"."""
    found = []
    for plot in PLOTS.get(kind, ()):
        for line in plot.lines:
            for series, column, label in (
                (main.curves.trained, line.column, line.label),
                (main.curves.evaluated, line.evaluated, f"held-out {line.label}"),
            ):
                if column not in series.values:
                    continue
                steps = series.odd(column)
                if len(steps):
                    named = ", ".join(f"{step:,}" for step in steps[:most])
                    more = f" and {len(steps) - most:,} more" if len(steps) > most else ""
                    found.append(f"{label} at step{'s' * (len(steps) > 1)} {named}{more}")
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """One trace: values over steps, and how they look. key: of the values, for the memory of thinned ones."""

    key: tuple[str, str, str, float]
    steps: Steps
    values: Floats
    look: dict[str, Any]
    markers: bool = False


def _parts(plot: Plot, main: Shown, past: Sequence[Shown], weight: float) -> Iterator[_Part]:
    """Past runs first, so that the chosen one lies on top."""
    smoothed = plot.smoothed and weight > 0
    if plot.laid_over:
        for place, run in enumerate(past):
            for line in plot.lines:
                if line.column in run.curves.trained.values:
                    own = f"{run.label}: {line.label}" if len(plot.lines) > 1 else run.label
                    # Named once, under the loss: dash and colour are the same everywhere.
                    look: dict[str, Any] = {} if plot.name == "loss" else {"showlegend": False}
                    look |= {"name": own, "line": {"color": PAST[place], "width": 1.4, "dash": DASHES[place]}}
                    yield _part(run, run.curves.trained, line.column, weight if smoothed else 0.0, look)
    for line in plot.lines:
        trained, evaluated = main.curves.trained, main.curves.evaluated
        if line.column in trained.values:
            thick = {"name": line.label, "line": {"color": line.colour, "width": 1.8}}
            if smoothed:
                faint = {
                    "name": f"{line.label}, raw",
                    "line": {"color": line.colour, "width": 1},
                    "opacity": 0.3,
                    "hoverinfo": "skip",
                    "showlegend": False,
                }
                yield _part(main, trained, line.column, 0.0, faint)
            yield _part(main, trained, line.column, weight if smoothed else 0.0, thick)
        if line.evaluated in evaluated.values:
            look = {
                "name": f"held-out {line.label}",
                "line": {"color": PURPLE if line.colour == BLUE else GREEN, "width": 1.8},
                "marker": {"size": 7, "symbol": "diamond"},
            }
            yield _part(main, evaluated, line.evaluated, 0.0, look, markers=True)


def _part(run: Shown, series: Series, column: str, weight: float, look: dict[str, Any], markers: bool = False) -> _Part:
    return _Part(
        (run.id, run.curves.mark, column, weight),
        series.steps,
        series.values[column],
        # Plotly puts it into a CSS selector, where a dot would begin another class, and the next run's figure an error.
        look | {"uid": f"{run.id}_{column}_{'raw' if 'opacity' in look else 'line'}".replace(".", "-")},
        markers,
    )


def _figure(plot: Plot, main: Shown, parts: Sequence[_Part], points: int) -> dict[str, Any] | None:
    if not any(part.key[0] == main.id for part in parts):
        return None
    data = []
    for part in parts:
        x, y = _thinned.get(part, points)
        alone = len(x) <= FEW or part.markers
        data.append(
            {"type": "scatter", "mode": "lines+markers" if alone else "lines", "x": x.data, "y": y.data} | part.look
        )
        if alone:
            data[-1]["marker"] = {"size": 4} | part.look.get("marker", {})
    layout: dict[str, Any] = {
        # Another run is another picture: zoom and hidden traces are kept within one.
        "uirevision": main.id,
        "title": {"text": plot.title, "x": 0, "xref": "paper", "y": 0.97, "yanchor": "top", "font": {"size": 13}},
        "showlegend": sum(part.look.get("showlegend", True) for part in parts) > 1,
        # Below, where it cannot grow into the title.
        "legend": {"orientation": "h", "x": 0, "y": -0.26, "yanchor": "top", "font": {"size": 11}},
        "xaxis": {"title": {"text": "step", "standoff": 4}, "tickformat": ","},
        "yaxis": {"tickformat": plot.tick} if plot.tick else {},
    }
    if main.curves.resumed:
        # The last few: a run that was resumed more often has other troubles than where.
        layout["shapes"] = [
            {
                "type": "line", "x0": step - 0.5, "x1": step - 0.5, "yref": "paper", "y0": 0, "y1": 1,
                "line": {"color": PAST[0], "width": 1, "dash": "dot"},
            }
            for step in main.curves.resumed[-5:]
        ]  # fmt: skip
    return {"data": data, "layout": layout}


@dataclass(frozen=True, slots=True)
class _Typed:
    """An array as plotly.js takes it: base64 of its bytes. A third of what the digits take."""

    data: dict[str, str]
    length: int

    def __len__(self) -> int:
        return self.length


def _typed(values: np.ndarray, dtype: str) -> _Typed:
    packed = np.ascontiguousarray(values, dtype=f"<{dtype}")
    return _Typed({"dtype": dtype, "bdata": base64.b64encode(packed.tobytes()).decode()}, len(packed))


def _width(last: int) -> str:
    """The smallest of plotly's types that holds the steps."""
    return "u2" if last < 2**16 else "i4"


def _point_bytes(last: int) -> float:
    return (int(_width(last)[1]) + 4) * 4 / 3


class _Thinned:
    """Traces made small, kept while they may be asked for again: past runs stay as they are, and every two seconds a
    figure whose run has not moved would be smoothed anew for each page that is open."""

    # Six past runs in eight figures and a dozen own traces, for several open pages; each is some 5 KB.
    MOST = 512

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple, tuple[_Typed, _Typed]] = OrderedDict()

    def get(self, part: _Part, points: int) -> tuple[_Typed, _Typed]:
        key = (*part.key, points)
        with self._lock:
            if found := self._kept.get(key):
                self._kept.move_to_end(key)
                return found
        weight = part.key[-1]
        if weight:
            # Smoothed first: of a thinned line it would be another curve.
            picked, y = curves.course(curves.smooth(part.values, weight), points)
        else:
            picked = curves.thin(part.values, points)
            y = part.values[picked]
        last = int(part.steps[-1]) if len(part.steps) else 0
        made = _typed(part.steps[picked], _width(last)), _typed(np.where(np.isfinite(y), y, np.nan), "f4")
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self.MOST:
                self._kept.popitem(last=False)
        return made


_thinned = _Thinned()
