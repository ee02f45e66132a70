"""The directions of the code: app → ui → jobs → katherine, and what the command line may load before a job."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
