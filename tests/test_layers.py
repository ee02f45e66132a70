"""The directions of the code: app → ui → jobs → katherine, and what the command line may load before a job."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import queue
from katherine import probesets, runs
from katherine.runs import State
from katherine.settings import Home

PROJECT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"katherine": {"katherine"}, "jobs": {"jobs", "katherine"}, "ui": {"ui", "jobs", "katherine"}}
OURS = {"app", "ui", "jobs", "katherine", "bench", "tests"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    modules = list((PROJECT / package).rglob("*.py"))
    assert modules
    for path in modules:
        found = imported(path)
        assert not (found & OURS) - MAY_IMPORT[package], path
        if package != "ui":
            assert not found & {"gradio", "fastapi", "plotly"}, path


@pytest.mark.parametrize(
    "modules", ["app, jobs.queue, katherine.corpus, katherine.recipe, katherine.doctor, katherine.probes", "ui.server"]
)
def test_the_command_line_and_the_panel_load_no_model_library(modules):
    code = (
        f"import sys, {modules}\n"
        "print(sorted({'torch', 'transformers', 'llama_cpp', 'trl', 'peft', 'unsloth', 'datasets'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


@pytest.fixture
def without_the_panel(tmp_path, katherine_home) -> Iterator[tuple[Home, Callable[..., str]]]:
    """A copy of the project with no ui/ in it, and its command line over a home of its own: (home, what it prints)."""
    project, home = tmp_path / "project", Home(tmp_path / "home")
    project.mkdir()
    home.root.mkdir()
    if katherine_home.cache.is_dir():
        (home.root / "cache").symlink_to(katherine_home.cache.resolve())
    shutil.copy(PROJECT / "app.py", project)
    for package in ("katherine", "jobs"):
        shutil.copytree(PROJECT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))

    def app(*words: str) -> str:
        ran = subprocess.run(
            [sys.executable, project / "app.py", *words],
            env=os.environ | {"KATHERINE_HOME": str(home.root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, f"{words}: {ran.stderr}"
        return ran.stdout

    yield home, app
    for run, _ in queue.unfinished(home):
        queue.stop(home, run.id, kill=True)
        queue.wait(home, run.id, timeout=30)


def test_without_the_panel_everything_is_done_from_the_command_line(without_the_panel):
    home, app = without_the_panel
    # Files into datasets; a choice among them; what is in them.
    sample = str(probesets.SAMPLE)
    whole = json.loads(app("prepare", sample, "--base", "smollm2-135m", "--uncurated", "--json"))["dataset"]
    less = json.loads(app("prepare", "--again", whole, "--leave-out", "talk.jsonl", "--base", "smollm2-135m", "--json"))
    assert whole in app("datasets") and "SFT" in app("datasets", "--compare", whole, less["dataset"])
    assert "⟦" in app("examples", whole, "--search", "katherine", "--count", "1")
    app("datasets", "--delete", less["dataset"])
    # What will be done, and what it will take.
    app("presets", "--save", "mine", "--preset", "demo", "--set", "sft.num_train_epochs=1")
    assert "30 optimiser steps" in app("recipe", "sft", "--preset", "mine", "--dataset", whole)
    assert "4.25" in app("prices", "--set", "H200 SXM=4.25")
    assert "H200 SXM" in app("estimate", whole, "--preset", "mine")
    # A pipeline; its first run ended, gone on with and ended again; made anew with changes.
    first, *rest = app("start", whole, "--preset", "mine").split()
    assert [runs.load(home, run).record.kind for run in rest] == ["dpo", "export", "probe"]
    app("stop", first, "--kill")
    queue.wait(home, first, timeout=60)
    assert "attempt 1" in app("log", first) and "attempt 1" in app("log", first, "--search", "ATTEMPT")
    app("resume", first)
    app("stop", first, "--kill")
    again = app("rerun", first, "--set", "sft.lora_r=16").strip()
    app("stop", again, "--kill")
    assert "cancelled" in app("runs") and "where mine differs" in app("runs", again)
    assert "lora_r" in app("runs", "--compare", first, again)
    assert runs.load(home, first).status().state is State.cancelled
    assert app("autostop") == "Auto-stop is off.\n"
