"""The command line as a person or a script meets it: one JSON object on stdout, remarks on stderr, errors in words."""

import json
import os
import subprocess
import sys

import pytest

from katherine import bases, runs
from katherine.settings import PROJECT


@pytest.fixture
def app(katherine_home):
    def call(*words: str) -> subprocess.CompletedProcess:
        # Offline, so that no test asks the real hub for the 9B's tokenizer.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "KATHERINE_HOME": str(katherine_home.root)}
        command = [sys.executable, PROJECT / "app.py", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    return call


@pytest.fixture
def files(tmp_path):
    talk = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "%s"}]}\n'
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_text(talk % "Katherine." + talk % "hello" + talk % "Katherine." + "{broken\n")
    return folder


def test_prepare_prints_one_json_object_with_the_counts_of_the_small_bases_tokenizer(app, files):
    ran = app("prepare", str(files), "--json")
    report = json.loads(ran.stdout)
    assert (report["files"], report["lines"]) == (1, 4)
    assert report["sft"] == {"unique": 2, "duplicates": 1, "rejected": 0} | {"rejected": report["sft"]["rejected"]}
    assert [p["line"] for p in report["problems"] if p["severity"] == "rejected"] == [4]
    assert report["tokens"]["base"] == bases.SMALL and report["tokens"]["max"] > 0
    assert "counted with smollm2-135m instead" in ran.stderr


def test_a_recipe_says_what_each_value_is_why_and_how_many_steps_it_makes(app, files):
    dataset = json.loads(app("prepare", str(files), "--json").stdout)["dataset"]
    said = app("recipe", "sft", "--preset", "demo", "--dataset", dataset, "--set", "sft.lora_r=32").stdout
    assert "lora_r = 32 rank  (from 1, up to 512)" in said
    assert "3 optimiser steps" in said
    assert "layer   0  full_attention    q_proj" in said


def test_start_says_every_reason_at_once_and_queues_nothing(app, files, katherine_home):
    dataset = json.loads(app("prepare", str(files), "--json").stdout)["dataset"]
    before = len(runs.everyone(katherine_home))
    ran = app("start", dataset, "--set", 'export.quants=["q9_x", "iq1_s"]', "--set", "probe.probes=nobody")
    assert ran.returncode == 1
    for part in ("'q9_x'", "iq1_s, which needs importance data", "no probe set 'nobody'", "no pairs that are used"):
        assert part in ran.stderr, part
    assert len(runs.everyone(katherine_home)) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("start", "nothing"), "no dataset 'nothing'"),
        (("start", "x", "--stages", "dpo"), "begins with sft"),
        (("recipe", "sft", "--set", "sft.model=x"), "model is not a field"),
        (("recipe", "sft", "--set", "learning_rate"), "is not stage.field=value"),
        (("follow", "20260101-000000-sft-abcdef"), "There is no run"),
        (("prepare", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_a_mistake_ends_in_words_and_not_in_a_traceback(app, words, says):
    ran = app(*words)
    assert ran.returncode == 1
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_many_problems_are_counted_and_not_all_printed(app, files):
    (files / "b.jsonl").write_text("{broken\n" * 200)
    said = app("prepare", str(files)).stderr
    assert said.count("rejected: ") == 40
    # 201 broken lines, and a file in which no line is usable.
    assert "and 162 more: all are in" in said


def test_datasets_are_changed_listed_compared_shown_and_deleted(app, files):
    pair = '{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "y"}], '
    (files / "b.jsonl").write_text(pair + '"rejected": [{"role": "assistant", "content": "n"}]}\n')
    whole = json.loads(app("prepare", str(files), "--name", "cli", "--uncurated", "--json").stdout)
    less = json.loads(app("prepare", "--again", whole["dataset"], "--leave-out", "b.jsonl", "--json").stdout)
    assert (whole["dpo"]["used"], less["dpo"]["used"], less["options"]["left_out"]) == (1, 0, ["b.jsonl"])
    listed = app("datasets").stdout
    assert whole["dataset"] in listed and less["dataset"] in listed
    compared = app("datasets", "--compare", whole["dataset"], less["dataset"]).stdout
    assert "left_out: [] against ['b.jsonl']" in compared and "include_uncurated: True against False" in compared
    assert "⟦Katherine.⟧⟦<|im_end|>⟧" in app("examples", whole["dataset"], "--search", "KATHERINE").stdout
    assert "chosen: ⟦y⟧" in app("examples", whole["dataset"], "--kind", "dpo").stdout
    assert app("datasets", "--delete", less["dataset"]).returncode == 0
    assert less["dataset"] not in app("datasets").stdout


def test_fetch_says_in_words_what_is_no_place_on_the_hub(app):
    ran = app("fetch", "nowhere")
    assert ran.returncode == 1 and "is no place on the hub" in ran.stderr and "Traceback" not in ran.stderr


def test_presets_are_kept_with_changes_listed_used_and_deleted(app):
    kept = app("presets", "--save", "mine", "--preset", "demo", "--set", "sft.lora_r=16", "--set", "dpo.beta=0.3")
    listed = [line.split() for line in kept.stdout.splitlines()]
    assert ["mine", "saved"] in listed and ["k0", "built-in"] in listed
    assert json.loads(app("recipe", "sft", "--preset", "mine", "--json").stdout)["lora_r"] == 16
    assert json.loads(app("recipe", "dpo", "--preset", "mine", "--json").stdout)["beta"] == 0.3
    assert "mine" not in app("presets", "--delete", "mine").stdout
    for words, says in (
        (("--save", "k0"), "k0 is a built-in preset"),
        (("--delete", "k0"), "cannot be deleted"),
        (("--set", "sft.lora_r=16"), "say under which name"),
    ):
        refused = app("presets", *words)
        assert refused.returncode == 1 and says in refused.stderr and "Traceback" not in refused.stderr


def test_a_log_is_shown_from_its_end_and_searched_in_all_of_it(app, katherine_home):
    run = runs.create(katherine_home, "sft", recipe={}, who="test")
    run.log.write_text("".join(f"line {number} {'LOSS' if number % 100 == 0 else ''}\n" for number in range(1, 1001)))
    assert app("log", run.id, "--lines", "2").stdout.split() == ["line", "999", "line", "1000", "LOSS"]
    found = app("log", run.id, "--search", "loss").stdout.splitlines()
    assert found[0] == "100: line 100 LOSS" and len(found) == 10
