import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from katherine import pace, runs
from katherine.pace import Pace
from katherine.runs import Run, State
from katherine.settings import Home

BEGAN = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def after(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runs.create(Home(tmp_path), "sft", recipe={}, who="test")


def log(run: Run, *rows: dict, attempt: int = 1) -> None:
    with (run.path / "metrics.jsonl").open("a") as out:
        for row in rows:
            out.write(json.dumps({"time": after(row.get("seconds", 0)), "attempt": attempt} | row) + "\n")


def training(run: Run, step: int, of: int = 100, attempt: int = 1, **more: object) -> runs.Status:
    return run.set_status(
        **{"state": State.running, "phase": "train", "step": step, "of": of, "attempt": attempt, "pid": 1}
        | {"started": after(0), "phase_began": after(0)}
        | more
    )


def steps(first: int, last: int, each: float = 2.0, start: float = 90.0) -> list[dict]:
    """Rows of training whose first step, which compiles, ended after `start` seconds."""
    return [
        {"step": s, "seconds": start + (s - first) * each, "loss": 0.0, "tokens_per_second": 1000.0 + s}
        for s in range(first, last + 1)
    ]


def test_the_first_steps_compiling_and_an_evaluation_do_not_count(run):
    rows = steps(1, 11)
    rows[6:] = [row | {"seconds": row["seconds"] + 60} for row in rows[6:]]
    log(run, *rows[:6], {"step": 6, "seconds": 155.0, "eval_loss": 1.0}, *rows[6:])
    speed = pace.of(run, training(run, 11), now=BEGAN + timedelta(seconds=170))
    assert speed.seconds_per_step == 2.0
    assert speed.tokens_per_second == 1006.0
    assert speed.seconds_left == 89 * 2.0
    assert speed.since_step == 0


def test_the_time_left_goes_on_counting_between_two_steps_and_never_below_the_next_one(run):
    log(run, *steps(1, 5, each=60))
    status = training(run, 5, of=6)
    last = BEGAN + timedelta(seconds=90 + 4 * 60)
    assert [pace.of(run, status, last + timedelta(seconds=s)).seconds_left for s in (0, 20, 60, 500)] == [60, 40, 0, 0]
    assert pace.of(run, status, last + timedelta(seconds=500)).since_step == 500


def test_a_resumed_run_is_as_fast_as_its_present_attempt(run):
    log(run, *steps(1, 50, each=9))
    log(run, *steps(40, 43, each=1, start=600), attempt=2)
    speed = pace.of(run, training(run, 43, attempt=2), now=BEGAN + timedelta(seconds=603))
    assert speed.seconds_per_step == 1.0 and speed.seconds_left == 57.0


def test_before_the_second_step_only_the_waiting_is_known(run):
    status = training(run, 0)
    assert pace.of(run, status, BEGAN + timedelta(seconds=30)) == Pace(since_step=30)
    log(run, *steps(1, 1))
    speed = pace.of(run, training(run, 1), BEGAN + timedelta(seconds=100))
    assert speed.seconds_per_step is None and speed.seconds_left is None and speed.since_step == 10


def test_a_phase_without_rows_goes_by_its_own_time(run):
    status = training(run, 25, of=100, phase="quantise", phase_began=after(100))
    log(run, *steps(1, 5))
    speed = pace.of(run, status, BEGAN + timedelta(seconds=150))
    assert (speed.seconds_per_step, speed.seconds_left, speed.tokens_per_second) == (2.0, 150.0, None)


def test_a_run_that_is_queued_or_has_ended_has_no_pace(run):
    log(run, *steps(1, 5))
    assert pace.of(run, run.status()) == Pace()
    assert pace.of(run, training(run, 5, state=State.succeeded)) == Pace()


def test_torn_and_foreign_rows_are_left_out(run):
    log(run, *steps(1, 5))
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('[1]\n{"step": "x", "attempt": 1, "time": "no"}\n{"step": 6, "sec')
    assert pace.of(run, training(run, 5), BEGAN + timedelta(seconds=98)).seconds_per_step == 2.0


def test_only_the_end_of_a_long_file_is_read(run):
    metrics = run.path / "metrics.jsonl"
    metrics.touch()
    # A hole that takes no room on the disk, and more memory than there is if it were read.
    os.truncate(metrics, 10**12)
    log(run, {}, *steps(1, 1000))
    assert pace.of(run, training(run, 1000, of=2000), BEGAN + timedelta(seconds=2088)).seconds_left == 2000.0
