"""Metrics as arrays: read on as they grow, and made small without losing what matters."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from katherine.curves import Cache, Reader, course, smooth, thin


def row(step: int, loss: object = 0.5, attempt: int = 1, **more: object) -> str:
    whole = {"time": "2026-11-23T10:00:00.000+00:00", "attempt": attempt, "step": step, "epoch": 0.1, "seconds": 1.5}
    return json.dumps(whole | {"loss": loss, "learning_rate": 1e-4, "grad_norm": 0.7} | more) + "\n"


@pytest.fixture
def metrics(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def losses(reader: Reader) -> dict[int, float]:
    trained = reader.read().trained
    return dict(zip(trained.steps.tolist(), trained.values["loss"].tolist(), strict=True))


def test_rows_become_columns_and_a_zero_is_a_value(metrics):
    append(metrics, row(1, 0.0, margin=0.0) + row(2, 0.25, margin=1.5))
    curves = Reader(metrics).read()
    assert curves.trained.steps.tolist() == [1, 2] and curves.trained.steps.dtype == np.int32
    assert curves.trained.values["loss"].tolist() == [0.0, 0.25]
    assert curves.trained.values["margin"].tolist() == [0.0, 1.5]
    assert curves.trained.values["loss"].dtype == np.float32
    assert "accuracy" not in curves.trained.values and len(curves.evaluated) == 0


def test_only_what_was_added_is_read_again(metrics, monkeypatch):
    append(metrics, "".join(row(step) for step in range(1, 1001)))
    reader = Reader(metrics)
    first = reader.read()
    read: list[int] = []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(len(found := original(*given))) or found)
    assert reader.read().mark == first.mark
    added = row(1001, 0.125)
    append(metrics, added)
    second = reader.read()
    assert second.mark != first.mark
    assert second.trained.steps[-1] == 1001 and second.trained.values["loss"][-1] == 0.125
    # The new row, and twice the few bytes by which the file is known again.
    assert sum(read) <= len(added) + 2 * 64
    assert len(first.trained) == 1000  # what was given out stays as it was


def test_a_row_counts_when_its_end_is_written(metrics):
    append(metrics, row(1) + '{"step": 2, "lo')
    reader = Reader(metrics)
    assert losses(reader) == {1: 0.5}
    append(metrics, 'ss": 0.25}\n')
    assert losses(reader) == {1: 0.5, 2: 0.25}


def test_torn_and_foreign_lines_are_passed_over(metrics):
    append(metrics, row(1) + '{"step": 2, "lo\n[1]\n\n{"phase": "merge"}\n{"step": -4, "loss": 1}\n{"step": 1e99}\n')
    append(metrics, '{"step": 3, "loss": {}}\n' + row(4))
    with metrics.open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 5, "loss": 0.5}\n')
    assert losses(Reader(metrics)) == {1: 0.5, 4: 0.5, 5: 0.5}


def test_something_endless_is_not_held_in_memory(metrics):
    append(metrics, row(1) + "x" * 3_000_000)
    reader = Reader(metrics)
    assert losses(reader) == {1: 0.5}
    append(metrics, "\n" + row(2))
    assert losses(reader) == {1: 0.5, 2: 0.5}


def test_numbers_that_are_not_finite_are_gaps_that_are_named(metrics):
    append(metrics, row(1) + row(2, "nan") + row(3, 0.5, grad_norm="inf") + row(4, 0.5, grad_norm=None))
    trained = Reader(metrics).read().trained
    assert trained.odd("loss").tolist() == [2]
    assert trained.odd("grad_norm").tolist() == [3, 4]
    assert np.isinf(trained.values["grad_norm"][2])


def test_a_value_that_begins_late_is_missing_before(metrics):
    append(metrics, row(1) + row(2, accuracy=0.75))
    values = Reader(metrics).read().trained.values["accuracy"]
    assert np.isnan(values[0]) and values[1] == 0.75


def test_evaluations_are_a_series_of_their_own(metrics):
    held_out = json.dumps({"attempt": 1, "step": 2, "eval_loss": 0.0, "eval_margin": 0.5}) + "\n"
    append(metrics, row(1) + row(2) + held_out + row(3))
    curves = Reader(metrics).read()
    assert curves.trained.steps.tolist() == [1, 2, 3]
    assert curves.evaluated.steps.tolist() == [2]
    assert curves.evaluated.values["eval_loss"].tolist() == [0.0]


@pytest.mark.parametrize("at_once", [True, False])
def test_after_a_resume_the_later_attempt_counts(metrics, at_once):
    held_out = json.dumps({"attempt": 1, "step": 4, "eval_loss": 9.0}) + "\n"
    before = "".join(row(step, 1.0) for step in range(1, 7)) + held_out
    after = row(4, 0.25, attempt=2) + row(5, 0.0, attempt=2)
    reader = Reader(metrics)
    append(metrics, before)
    if not at_once:
        first = reader.read()
    append(metrics, after)
    assert losses(reader) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.25, 5: 0.0}
    curves = reader.read()
    assert curves.resumed == (4,) and len(curves.evaluated) == 0
    if not at_once:
        assert first.trained.values["loss"].tolist() == [1.0] * 6


def test_of_one_step_the_last_row_counts(metrics):
    append(metrics, row(1) + row(2, 0.5) + row(2, 0.25) + row(3))
    assert losses(Reader(metrics)) == {1: 0.5, 2: 0.25, 3: 0.5}


@pytest.mark.parametrize("how", ["replaced", "cut short", "rewritten in place", "removed"])
def test_a_file_that_is_another_is_read_anew(metrics, how):
    append(metrics, "".join(row(step) for step in range(1, 20)))
    reader = Reader(metrics)
    before = reader.read().mark
    new = row(7, 0.125)
    if how == "replaced":
        other = metrics.with_name("other")
        other.write_text(new)
        other.replace(metrics)
    elif how == "rewritten in place":
        new = "".join(row(step, 0.125) for step in range(7, 50))
        with metrics.open("r+") as file:
            file.write(new)
    elif how == "cut short":
        with metrics.open("r+") as file:
            file.truncate()
            file.write(new)
    else:
        metrics.unlink()
        assert losses_or_none(reader) is None
        metrics.write_text(new)
    found = losses(reader)
    assert min(found) == 7 and set(found.values()) == {0.125}
    assert reader.read().mark != before


def losses_or_none(reader: Reader) -> dict[int, float] | None:
    return losses(reader) if len(reader.read().trained) else None


def test_no_metrics_yet_is_an_empty_curve(metrics):
    curves = Reader(metrics).read()
    assert len(curves.trained) == 0 and curves.trained.values == {}


def test_the_cache_forgets_what_was_asked_for_longest_ago(tmp_path):
    paths = []
    for number in range(4):
        paths.append(tmp_path / str(number))
        append(paths[-1], "".join(row(step) for step in range(1, 2001)))
    one = Reader(paths[0])
    one.read()
    cache = Cache(limit=int(2.5 * one.held))
    for path in paths:
        assert len(cache.read(path).trained) == 2000
        assert cache.held <= 3 * one.held
    assert cache.held == 2 * one.held
    assert len(cache.read(paths[0]).trained) == 2000  # forgotten is not gone


def test_smoothing_is_tensorboards_debiased_average():
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    last, expected = 0.0, []
    for number, value in enumerate(values.tolist(), 1):
        last = last * 0.9 + 0.1 * value
        expected.append(last / (1 - 0.9**number))
    assert np.allclose(smooth(values, 0.9), expected, atol=1e-6)
    assert smooth(values, 0.9)[0] == pytest.approx(values[0])
    assert smooth(values, 0).tolist() == values.tolist()
    assert np.allclose(smooth(np.full(300, 0.25, np.float32), 0.99), 0.25)


def test_smoothing_leaves_gaps_as_they_are_and_goes_on_behind_them():
    values = np.array([1, 1, np.nan, np.inf, 1, 1], np.float32)
    found = smooth(values, 0.5)
    assert np.isnan(found[2]) and np.isinf(found[3])
    assert found[[0, 1, 4, 5]].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("weight", [-0.1, 1.0, float("nan")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        smooth(np.ones(3, np.float32), weight)


@pytest.mark.parametrize("count", [11, 177, 5_000, 50_000, 65_537])
def test_thinning_keeps_every_wild_step_and_the_ends(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=count).astype(np.float32)
    wild = sorted(rng.choice(count, 4, replace=False).tolist())
    values[wild] = [50, -50, 60, np.nan]
    for points in (10, 40, 300):
        picked = thin(values, points)
        assert len(picked) <= max(points, 10)
        assert (np.diff(picked) > 0).all()
        assert {0, count - 1} <= set(picked.tolist())
        assert np.nanmax(values[picked]) == np.nanmax(values) and np.nanmin(values[picked]) == np.nanmin(values)
        assert wild[3] in picked


def test_points_stay_where_they_are_while_a_run_grows():
    values = np.random.default_rng(3).normal(size=50_000).astype(np.float32)
    before, after = thin(values[:40_000], 300), thin(values[:41_000], 300)
    # All but those of the bucket that was not full, and the end.
    assert set(before[:-5].tolist()) <= set(after.tolist())


def test_thinning_nothing_but_gaps_is_possible():
    values = np.full(1000, np.nan, np.float32)
    assert 0 < len(thin(values, 50)) <= 50
    places, means = course(values, 50)
    assert len(places) == len(means) <= 50 and np.isnan(means).all()


def test_a_smoothed_lines_course_is_the_mean_of_its_buckets():
    values = np.arange(1000, dtype=np.float32)
    values[3] = np.nan
    places, means = course(values, 100)
    assert len(places) <= 100 and places[-1] == 999
    assert means[1] == np.mean(values[places[0] + 1 : places[1] + 1])
    assert means[0] == pytest.approx(np.nanmean(values[: places[0] + 1]))
    short = np.array([1, np.nan], np.float32)
    assert course(short, 10)[1] is short
