"""Folders in memory for a run's large files: gone with the run, and with the next one where it was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from katherine import memory, scratch
from katherine.settings import PROJECT

HOLD = """
import sys, time
from pathlib import Path
from katherine import scratch

scratch.SHARED_MEMORY = Path(sys.argv[1])
with scratch.in_memory("killed") as folder:
    (folder / "merged").mkdir()
    (folder / "merged" / "weights").write_bytes(b"18 GB")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path)
    return tmp_path


def test_a_folder_is_gone_at_the_end_however_it_ends(shared):
    with pytest.raises(ValueError, match="broken"), scratch.in_memory("run") as folder:
        assert folder is not None and folder.parent == shared and folder.stat().st_mode & 0o777 == 0o700
        (folder / "weights").write_bytes(b"18 GB")
        raise ValueError("broken")
    assert list(shared.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_holds_stays(shared):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(shared)], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "held\n"
    left = shared / "katherine-scratch-killed/merged/weights"
    with scratch.in_memory("other"):
        assert left.is_file()
    # Nor is its name given twice.
    with scratch.in_memory("killed") as folder:
        assert folder is None
    assert left.is_file()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert left.is_file()
    with scratch.in_memory("killed") as folder:
        assert folder is not None and not left.exists()
    assert list(shared.iterdir()) == []


def test_where_there_is_no_memory_to_share_there_is_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path / "none")
    with scratch.in_memory("run") as folder:
        assert folder is None


def test_memory_is_ample_where_as_much_again_is_left_and_the_file_system_has_the_room(shared, monkeypatch):
    monkeypatch.setattr(memory, "host", lambda: 2000)
    assert scratch.is_ample(shared, 1000) and not scratch.is_ample(shared, 1001)
    monkeypatch.setattr(memory, "host", lambda: 2**62)
    assert not scratch.is_ample(shared, 2**60) and not scratch.is_ample(shared / "none", 1)
