"""Figures as the page gets them: what plotly accepts, small at any length, and nothing lost on the way."""

import base64
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from katherine.curves import TRAINED, Curves, Series
from ui import plots
from ui.plots import Shown


def shown(name: str, count: int, columns: tuple[str, ...] = TRAINED, seed: int = 0, **more: object) -> Shown:
    rng = np.random.default_rng(seed)
    steps = np.arange(1, count + 1, dtype=np.int32)
    values = {column: rng.normal(size=count).astype(np.float32) for column in columns}
    nothing = Series(np.empty(0, np.int32), {})
    return Shown(
        name, f"SFT · 2026-11-23 10:00 · {name}", Curves(Series(steps, values), nothing, (), f"{count}.{seed}")
    )


def sft(name: str, count: int, seed: int = 0) -> Shown:
    return shown(name, count, TRAINED[:-4], seed)


def numbers(array: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])


def traces(figure: dict, part: str = "") -> list[dict]:
    return [trace for trace in figure["data"] if part in trace["name"]]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_plotly_accepts_every_figure(kind):
    past = [shown(f"past{n}", 90, seed=n) for n in range(3)]
    drawn = plots.draw(kind, shown("main", 200), past, 0.6)
    assert list(drawn) == [plot.name for plot in plots.PLOTS[kind]]
    for figure in drawn.values():
        go.Figure(figure)


def test_a_short_run_is_drawn_value_by_value():
    main = sft("main", 177)
    (trace,) = plots.draw("sft", main)["loss"]["data"]
    assert numbers(trace["x"]).tolist() == list(range(1, 178))
    assert np.array_equal(numbers(trace["y"]), main.curves.trained.values["loss"])


def test_raw_lies_faint_under_smoothed_and_without_smoothing_there_is_one_line():
    main = sft("main", 500)
    raw, smooth = plots.draw("sft", main, (), 0.9)["loss"]["data"]
    assert raw["opacity"] < 1 and not raw["showlegend"] and "opacity" not in smooth
    assert np.nanstd(numbers(smooth["y"])) < np.nanstd(numbers(raw["y"])) / 2
    assert len(plots.draw("sft", main, (), 0.0)["loss"]["data"]) == 1
    assert len(plots.draw("sft", main, (), 0.9)["learning_rate"]["data"]) == 1


@pytest.mark.parametrize("count", [33_000, 50_000, 64_000, 66_000, 500_000])
@pytest.mark.parametrize(("kind", "past"), [("sft", 0), ("sft", 3), ("dpo", 0), ("dpo", 3), ("dpo", 6)])
def test_a_refresh_stays_under_60_kb_however_long_the_runs(kind, past, count):
    over = [shown(f"20261123-10000{n}-dpo-abcdef", count, seed=n + 1) for n in range(past)]
    drawn = plots.draw(kind, shown("20261123-100000-dpo-fedcba", count), over, 0.6)
    size = len(json.dumps(drawn))
    assert 15_000 < size < 60_000


def test_a_spike_of_one_step_is_drawn_among_fifty_thousand():
    main = shown("main", 50_000)
    main.curves.trained.values["loss"][31_234] = 99.0
    raw, _ = plots.draw("dpo", main, [shown("past", 50_000, seed=1)], 0.6)["loss"]["data"][-2:]
    assert numbers(raw["y"]).max() == 99.0
    assert 31_235 in numbers(raw["x"])


def test_steps_beyond_what_two_bytes_hold_are_whole():
    (trace,) = plots.draw("sft", sft("main", 70_000))["grad_norm"]["data"]
    assert numbers(trace["x"])[-1] == 70_000


def test_gaps_are_gaps_and_are_named():
    main = sft("main", 100)
    main.curves.trained.values["grad_norm"][[4, 5]] = [np.nan, np.inf]
    (trace,) = plots.draw("sft", main)["grad_norm"]["data"]
    assert np.isnan(numbers(trace["y"])[[4, 5]]).all()
    assert plots.odd("sft", main) == ["gradient norm at steps 5, 6"]
    main.curves.trained.values["loss"][:] = np.nan
    assert plots.odd("sft", main)[0] == "loss at steps 1, 2, 3, 4, 5 and 95 more"


def test_zoom_is_kept_within_a_run_and_not_carried_to_another():
    layouts = [plots.draw("sft", sft(name, count))["loss"]["layout"] for name, count in (("a", 5), ("a", 9), ("b", 9))]
    assert layouts[0]["uirevision"] == layouts[1]["uirevision"] != layouts[2]["uirevision"]
    uids = [[trace["uid"] for trace in plots.draw("sft", sft("a", 9), past, 0.5)["loss"]["data"]] for past in
            ((), [sft("b", 9)])]  # fmt: skip
    assert all(re.fullmatch(r"[\w-]+", uid) for each in uids for uid in each), "a class of CSS, in plotly.js"
    assert uids[1][-2:] == uids[0]  # a hidden trace stays the same trace when a past run comes under it


def test_light_and_dark_are_the_pages_to_choose():
    for figure in plots.draw("dpo", shown("main", 20), [], 0.5).values():
        assert not {"template", "paper_bgcolor", "plot_bgcolor", "font"} & set(figure["layout"])


def test_past_runs_are_named_once_under_the_loss_and_lie_below():
    drawn = plots.draw("sft", sft("main", 50), [sft("other", 30)], 0.0)
    first, last = drawn["loss"]["data"]
    assert "other" in first["name"] and last["name"] == "loss" and drawn["loss"]["layout"]["showlegend"]
    assert not drawn["grad_norm"]["layout"]["showlegend"]
    assert first["line"]["dash"] and "dash" not in last["line"]
    assert len(drawn["speed"]["data"]) == 1  # another machine's pace says nothing here


def test_two_rewards_are_told_apart_and_a_single_point_is_seen():
    figure = plots.draw("dpo", shown("main", 1))["rewards"]
    assert [trace["name"] for trace in figure["data"]] == ["chosen", "rejected"]
    assert {trace["mode"] for trace in figure["data"]} == {"lines+markers"}
    assert figure["layout"]["showlegend"]


def test_held_out_values_are_points_of_their_own():
    main = sft("main", 50)
    evaluated = Series(np.array([25, 50], np.int32), {"eval_loss": np.array([0.5, 0.25], np.float32)})
    main = Shown(main.id, main.label, Curves(main.curves.trained, evaluated, (26,), "x"))
    figure = plots.draw("sft", main)["loss"]
    (held_out,) = traces(figure, "held-out")
    assert numbers(held_out["y"]).tolist() == [0.5, 0.25] and held_out["mode"] == "lines+markers"
    assert figure["layout"]["shapes"][0]["x0"] == 25.5


def test_before_anything_is_logged_there_is_nothing_to_draw_but_every_place_for_it():
    nothing = Series(np.empty(0, np.int32), {})
    main = Shown("main", "main", Curves(nothing, nothing, (), ""))
    drawn = plots.draw("dpo", main, [shown("past", 50)], 0.5)
    assert set(drawn) == set(plots.NAMES) and set(drawn.values()) == {None}
    assert plots.draw("export", main) == {}


def test_the_mark_changes_with_all_that_is_drawn():
    main, past = sft("main", 50), sft("past", 50, seed=1)
    marks = [
        plots.mark("sft", main, [], 0.5),
        plots.mark("sft", main, [past], 0.5),
        plots.mark("sft", main, [], 0.6),
        plots.mark("sft", past, [], 0.5),
        plots.mark("sft", sft("main", 51), [], 0.5),
    ]
    assert len(set(marks)) == len(marks)
    assert plots.mark("sft", sft("main", 50), [], 0.5) == marks[0]
