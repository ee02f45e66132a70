"""Which GPUs a process may use, by the driver and CUDA_VISIBLE_DEVICES together."""

import importlib.util
import sys
from types import ModuleType

import pytest

from katherine import gpu, memory
from katherine.errors import SetupError
from katherine.settings import PROJECT


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Of two cards."""
    spec = importlib.util.spec_from_file_location("pynvml", PROJECT / "tests" / "two_cards" / "pynvml.py")
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    spec.loader.exec_module(made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def index_of(card: gpu.GpuReading | None) -> int | None:
    return None if card is None else card.index


@pytest.mark.parametrize(
    ("told", "usable", "mine"),
    [
        (None, ("0", "1"), 0),
        ("1", ("1",), 1),
        ("1,0", ("1", "0"), 1),
        ("0,7", ("0",), 0),
        # By number, so that it is the same card to whoever has not named it so.
        ("GPU-1111,0", ("1", "0"), 1),
        # The card itself, and so never two of them.
        ("MIG-7,MIG-8", ("MIG-7", "MIG-8"), 0),
        ("", ("0",), None),
    ],
)
def test_what_is_visible_is_usable_and_the_first_of_it_is_mine(driver, monkeypatch, told, usable, mine):
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert gpu.usable() == usable
    assert index_of(gpu.mine()) == mine
    assert gpu.alone("1") == ({} if told == "" else {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def test_memory_is_that_of_the_card_that_is_named(driver, monkeypatch):
    full = driver._Memory(used=150_000_000_000)
    monkeypatch.setattr(driver, "nvmlDeviceGetMemoryInfo", lambda card, version: full if card else driver._Memory())
    assert memory.card("0") == full.total and memory.card("1") == full.total - full.used


def test_a_driver_that_does_not_answer_moves_nobody_to_another_card(driver, monkeypatch):
    def unwell() -> None:
        raise driver.NVMLError("GPU is lost")

    monkeypatch.setattr(driver, "nvmlDeviceGetCount", unwell)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.usable() == ("1",) and memory.card("1") is None
    with pytest.raises(SetupError, match="GPU is lost"):
        gpu.mine()


def test_without_a_card_the_processor_is_the_only_one(monkeypatch):
    monkeypatch.setattr(gpu, "read", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpu.usable() == (gpu.PROCESSOR,) and gpu.mine() is None and memory.card("0") is None
