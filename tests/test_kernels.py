"""The launches that fla is told, as it would read them: what it makes of them on a GPU is in tests/gpu."""

import importlib.metadata
import json

import pytest

from katherine import kernels


def test_they_are_written_as_fla_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {kernels.PACKAGE: kernels.VERSION}[name])
    environment = kernels.hand_over(tmp_path / "fla", "9.0")
    assert environment == {"FLA_CACHE_MODE": "default", "FLA_CONFIG_DIR": str(tmp_path / "fla")}
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "fla").iterdir()}
    assert len(found) == len(kernels.MEASURED)
    assert found["chunk_fwd_kernel_o.json"]["default_config"] == {
        "kwargs": {"BK": 64, "BV": 64},
        "num_warps": 4,
        "num_stages": 3,
        "num_ctas": 1,
    }


@pytest.mark.parametrize(
    ("installed", "capability"), [(None, "9.0"), ("0.7.0", "9.0"), (kernels.VERSION, "8.9"), (kernels.VERSION, "12.0")]
)
def test_another_version_and_another_card_tune_as_ever(tmp_path, monkeypatch, installed, capability):
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert kernels.hand_over(tmp_path / "fla", capability) == {}
    assert not (tmp_path / "fla").exists()


def test_the_version_is_the_one_that_is_installed_on_a_gpu():
    from katherine.settings import PROJECT

    assert f"{kernels.PACKAGE}=={kernels.VERSION}" in (PROJECT / "requirements-cuda.txt").read_text().split()
