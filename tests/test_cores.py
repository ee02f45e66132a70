"""How threads wait for one another on few cores, as every child process is told."""

import subprocess
import sys

import pytest

from katherine import cores
from katherine.settings import child_environment


@pytest.mark.parametrize(("count", "told"), [(cores.FEW, cores.SPINS), (cores.FEW + 1, None)])
def test_on_few_cores_children_spin_shortly_and_on_many_as_usual(monkeypatch, count, told):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(cores, "count", lambda: count)
    assert child_environment().get("GOMP_SPINCOUNT") == told


def test_who_says_how_long_is_heard(monkeypatch):
    monkeypatch.setattr(cores, "count", lambda: 1)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert child_environment()["GOMP_SPINCOUNT"] == "7"


def test_torch_hears_it():
    """OpenMP shows what it took from its environment when it is loaded, with torch; a library of another maker would
    not know the name."""
    ran = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=child_environment(OMP_DISPLAY_ENV="VERBOSE", GOMP_SPINCOUNT=cores.SPINS),
        capture_output=True,
        text=True,
    )
    assert f"GOMP_SPINCOUNT = '{cores.SPINS}'" in ran.stderr, ran.stderr
