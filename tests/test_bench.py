"""What benchmarks reckon from what they saw; what they time is theirs to say."""

import importlib
import inspect
import json

import pytest

import app
from bench import gpu
from katherine import corpus
from katherine.settings import Home


@pytest.mark.parametrize("word", app.BENCHES)
def test_each_word_of_bench_has_a_program_that_takes_its_arguments(word):
    module = importlib.import_module(f"bench.{app.BENCHES[word] or word}")
    assert list(inspect.signature(module.main).parameters) in (["argv"], ["arguments"])


def rows(*seconds: float) -> list[dict]:
    ends = [sum(seconds[: index + 1]) for index in range(len(seconds))]
    return [
        {"step": index + 1, "seconds": end, "loss": 5.0 - index, "tokens_per_second": 100.0, "memory_gib": 3.0 + index}
        for index, end in enumerate(ends)
    ]


def test_the_median_leaves_out_steps_in_which_kernels_were_tuned():
    found = gpu.steps_of(rows(40.0, 9.0, 1.0, 1.0, 1.0, 0.5, 0.4, 0.6))
    assert found["first"] == 40.0 and found["median"] == pytest.approx(0.5)
    assert found["range"] == pytest.approx([0.4, 0.6]) and found["memory_gib"] == 10.0 and found["steps"] == 8
    assert gpu.steps_of(rows(2.0, 1.0))["median"] == pytest.approx(1.5), "with few steps all count"


def test_the_arithmetic_of_several_gpus_is_held_against_as_many():
    alone = gpu.share({"tokens_per_second": 1000}, 1_000_000, 1e10)
    assert alone == pytest.approx(0.4)
    assert gpu.share({"tokens_per_second": 1000, "gpus": 2}, 1_000_000, 1e10) == pytest.approx(alone / 2)


def test_the_table_holds_ways_against_the_first_and_says_what_failed():
    slow, fast = (
        gpu.steps_of(rows(9.0, *[each] * 9)) | {"load": 20.0, "share": 0.25, "lines": []} for each in (1.0, 0.25)
    )
    report = {
        "ways": {"slow": slow, "fast": fast, "broken": {"failed": "out of memory"}},
        "stages": {"export": {"state": "succeeded", "seconds": 90.0, "parts": {"merge": 30.0, "total": 88.0}}},
        "steps_of_the_recipe": 177,
        "chat": None,
    }
    lines = gpu.table(report).splitlines()
    assert "1.000 s |" in lines[2] and "0.250 s (4.00 × as fast)" in lines[3] and "25%" in lines[3]
    assert "73 s projected" in lines[3] and "failed: out of memory" in lines[4] and "merge 30" in lines[5]


def test_what_is_fed_has_the_recipes_lengths(tmp_path, katherine_home, tiny_qwen):
    home = Home(tmp_path)
    (tmp_path / "cache").symlink_to(katherine_home.cache)
    made = gpu.prepare(home, tiny_qwen, 400, 40)
    report = json.loads((corpus.folder(home, made) / "report.json").read_text())
    assert report["sft"]["unique"] == 400 and report["dpo"]["used"] == 40
    assert 90 < report["tokens"]["p50"] < 115 and report["tokens"]["max"] <= 290


def test_a_way_is_measured_in_a_process_of_its_own(tmp_path, katherine_home, tiny_qwen, monkeypatch):
    home = Home(tmp_path)
    (tmp_path / "cache").symlink_to(katherine_home.cache)
    dataset = corpus.folder(home, gpu.prepare(home, tiny_qwen, 4, 4))
    found = gpu.run_way("fitted, 4 bit", tiny_qwen, dataset)
    # no card here: a way that cannot work says so in the table, and the others go on
    assert "turn load_in_4bit off" in found["failed"]
    found = gpu.run_way("fitted, 16 bit", tiny_qwen, dataset)
    assert found["steps"] == 1 and found["first"] > 0 and found["load"] > 0
