"""How fast a run goes and when its present phase will be done, from the end of its metrics.jsonl and its status. Read
every two seconds by pages, so never the whole file; what the rows hold is training's affair."""

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from katherine.runs import ENDED, Run, Status

# The median of so many steps forgets an evaluation or a checkpoint between two of them, and follows a card that slows
# down within half a minute at a second or two a step.
RECENT_STEPS = 20
# A checkpoint or an evaluation between two steps takes a few of them; what takes this many times the usual step, and at
# least this long, has probably stalled.
STALLED_STEPS, STALLED_SECONDS = 10, 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """None stands for what is not known yet.

    seconds_per_step: the median of the last steps where they are logged, else the phase's time by its steps.
    tokens_per_second: the median over the same steps; None where a step is not one of training.
    seconds_left: until the last step of the present phase, without the checkpoints and evaluations on the way.
    since_step: seconds since the last step was logged, or since the phase began.
    """

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    since_step: float | None = None

    @property
    def stalled(self) -> bool:
        """Whether the run has made no step for so much longer than usual that somebody should look."""
        if self.seconds_per_step is None or self.since_step is None:
            return False
        return self.since_step > max(STALLED_STEPS * self.seconds_per_step, STALLED_SECONDS)


def of(run: Run, status: Status, now: datetime | None = None) -> Pace:
    """The pace of a run that is under way; nothing is known of one that is queued or has ended."""
    if status.state in ENDED or status.started is None or status.pid is None:
        return Pace()
    now = now or datetime.now(UTC)
    rows = _steps(run, status)
    if rows and status.of:
        took = [(b["at"] - a["at"]) / (b["step"] - a["step"]) for a, b in pairwise(rows)]
        rates = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
        last = _since(rows[-1]["time"], now)
        each = statistics.median(took) if took else None
        return Pace(
            seconds_per_step=each,
            tokens_per_second=statistics.median(rates) if rates else None,
            seconds_left=_left(each, status.of - rows[-1]["step"], last),
            since_step=last,
        )
    began = status.phase_began or status.started
    spent = _since(began, now)
    if not status.of or not status.step:
        return Pace(since_step=spent)
    each = spent / status.step
    return Pace(seconds_per_step=each, seconds_left=each * max(status.of - status.step, 0), since_step=None)


def _left(each: float | None, steps: int, since: float) -> float | None:
    """Counts down between two slow steps as well, and never below the steps that are still to come after this one."""
    if each is None:
        return None
    return max(each * max(steps, 0) - min(since, each), 0.0)


def _since(iso: str, now: datetime) -> float:
    # A clock that was set back must not make a time negative.
    return max((now - datetime.fromisoformat(iso)).total_seconds(), 0.0)


def _steps(run: Run, status: Status) -> list[dict[str, Any]]:
    """The last steps of this attempt and of the present phase, one row a step: step, at (seconds on one clock), time,
    tokens_per_second."""
    found: dict[int, dict[str, Any]] = {}
    begun = status.phase_began or status.started or ""
    for row in run.newest_metrics():
        if len(found) > RECENT_STEPS:
            break
        try:
            step, time = int(row["step"]), str(row["time"])
            # A resumed run logs the steps after its checkpoint again; an evaluation has a row of its own.
            if row["attempt"] != status.attempt or time < begun or "eval_loss" in row:
                continue
            seconds = row.get("seconds")
            found.setdefault(
                step,
                {
                    "step": step,
                    "at": datetime.fromisoformat(time).timestamp() if seconds is None else float(seconds),
                    "time": time,
                    "tokens_per_second": row.get("tokens_per_second"),
                },
            )
        except (KeyError, TypeError, ValueError):
            continue
    return [found[step] for step in sorted(found)]
