"""Errands as real child processes: they outlive whoever asked, begin once, and end in words."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_stand_in import Hub, HubStandIn

from jobs import errands, queue, slot
from jobs.errands import Errand
from katherine import bases, corpus
from katherine.errors import Busy, NotFound
from katherine.runs import ENDED, State, Status
from katherine.settings import PROJECT, Home

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 30.0
LINE = '{"messages": [{"role": "user", "content": "hi %d"}, {"role": "assistant", "content": "hey"}]}\n'


@pytest.fixture
def home(tmp_path: Path, katherine_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    made.root.mkdir()
    if katherine_home.cache.exists():
        made.cache.symlink_to(katherine_home.cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield made
    for errand in errands.under_way(made):
        errands.stop(made, errand.id)
        errands.stop(made, errand.id)
        ended(made, errand)


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that lets a download begin and then says nothing more: an errand that lasts."""
    with HubStandIn() as made:
        made.files["owner/talk"] = {"a.jsonl": b"{}\n" * 100}
        made.stalls.add("a.jsonl")
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield made


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ended(home: Home, errand: Errand) -> Status:
    status = errands.wait(home, errand.id, PATIENCE)
    assert status.state in ENDED, status
    return status


def files(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(LINE % n for n in range(20)) + "{broken\n")
    return folder


def ask_prepare(home: Home, *paths: Path, **options: object) -> Errand:
    return errands.start(home, "prepare", {"paths": [str(p) for p in paths], "base": bases.SMALL} | options, "test")


def ask_fetch(home: Home) -> Errand:
    return errands.start(home, "fetch", {"path": "owner/talk"}, "test")


def downloading(errand: Errand) -> Errand:
    until(lambda: errand.status().phase == "download")
    return errand


def test_preparing_ends_with_the_datasets_id(home, tmp_path):
    errand = ask_prepare(home, files(tmp_path / "in"), name="k0")
    status = ended(home, errand)
    assert (status.state, status.phase, status.pid) == (State.succeeded, "count", None)
    dataset = corpus.load(home, errand.result()["dataset"])
    assert dataset.id.startswith("k0-") and dataset.report["sft"]["unique"] == 20
    assert dataset.report["tokens"]["base"] == bases.SMALL


def test_what_cannot_be_prepared_fails_with_the_reason_and_leaves_nothing(home, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    errand = ask_prepare(home, tmp_path / "bad.jsonl", tmp_path / "bad.jsonl")
    status = ended(home, errand)
    assert status.state is State.failed and "Nothing in these files can be used" in status.reason
    assert not list(home.datasets.iterdir())
    with pytest.raises(NotFound):
        errand.result()


def test_a_base_that_cannot_be_had_is_replaced_and_said(home, tmp_path):
    errand = ask_prepare(home, files(tmp_path / "in"), base="nobody/here")
    assert ended(home, errand).state is State.succeeded
    assert f"Tokens are counted with {bases.SMALL} instead" in errand.result()["remark"]


def test_a_dataset_is_changed_into_another_one(home, tmp_path):
    folder = files(tmp_path / "in")
    (folder / "b.jsonl").write_text(LINE % 1000)
    first = ask_prepare(home, folder)
    ended(home, first)
    request = {"dataset": first.result()["dataset"], "leave_out": ["b.jsonl"], "base": bases.SMALL}
    errand = errands.start(home, "prepare", request, "test")
    assert ended(home, errand).state is State.succeeded
    assert corpus.load(home, errand.result()["dataset"]).report["sft"]["unique"] == 20


def test_fifty_simultaneous_starts_make_one_errand(home, stalled):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(ask_fetch(home).id)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 50 and len(set(found)) == 1
    assert [errand.id for errand in errands.everyone(home)] == found[:1]


def test_an_errand_outlives_the_process_and_the_terminal_that_asked(home, stalled):
    code = (
        "import sys, time; from pathlib import Path; from jobs import errands; from katherine.settings import Home\n"
        "print(errands.start(Home(Path(sys.argv[1])), 'fetch', {'path': 'owner/talk'}, 'test').id, flush=True)\n"
        "time.sleep(60)"
    )
    asker = subprocess.Popen(
        [sys.executable, "-c", code, str(home.root)], cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True
    )
    errand = downloading(errands.load(home, asker.stdout.readline().decode().strip()))
    os.killpg(asker.pid, signal.SIGKILL)
    asker.wait()
    assert errand.status().state is State.running
    stalled.stalls.clear()
    stalled.ending.set()
    assert ended(home, errand).state is State.succeeded
    assert (home.inbox / "owner--talk" / "a.jsonl").stat().st_size == 300


def test_an_errand_that_is_killed_is_interrupted_and_can_be_started_again(home, stalled):
    errand = downloading(ask_fetch(home))
    status = errand.status()
    assert queue.ticks(status.pid) == status.pid_started
    os.kill(status.pid, signal.SIGKILL)
    until(lambda: errand.status().state is State.interrupted)
    assert errand.status().remedy == "Start it again."
    again = ask_fetch(home)
    assert again.id != errand.id


def test_one_that_dies_before_it_says_its_pid_is_interrupted(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    errand = ask_fetch(home)
    until(lambda: errand.status().state is State.interrupted)


def test_a_stop_ends_it_at_once_and_removes_what_was_half_made(home, stalled):
    errand = downloading(ask_fetch(home))
    assert errands.stop(home, errand.id).state in (State.stopping, State.cancelled)
    status = ended(home, errand)
    assert (status.state, status.reason) == (State.cancelled, "Stopped by you. Nothing was kept.")
    assert errands.stop(home, errand.id).state is State.cancelled
    assert not list(home.inbox.iterdir())


def test_a_stop_in_the_midst_of_preparing_leaves_no_draft(home, tmp_path):
    file = tmp_path / "big.jsonl"
    file.write_text("".join(LINE % n for n in range(200_000)))
    errand = ask_prepare(home, file)
    until(lambda: bool(list(home.datasets.glob(".draft-*"))))
    errands.stop(home, errand.id)
    assert ended(home, errand).state is State.cancelled
    assert not list(home.datasets.iterdir())


def test_one_that_is_deaf_is_killed_by_the_second_stop(home, stalled):
    errand = downloading(ask_fetch(home))
    os.kill(errand.status().pid, signal.SIGSTOP)
    errands.stop(home, errand.id)
    assert errand.status().state is State.stopping
    errands.stop(home, errand.id)
    status = ended(home, errand)
    assert (status.state, status.reason) == (State.cancelled, "Stopped by you and killed.")


def test_only_the_secrets_that_a_kind_needs_reach_its_process(home, stalled, monkeypatch):
    for name in ("HF_TOKEN", "HF_READ_TOKEN", "RUNPOD_API_KEY", "KATHERINE_OPERATOR_PASSWORD"):
        monkeypatch.setenv(name, f"secret-{name}")
    errand = downloading(ask_fetch(home))
    environment = Path(f"/proc/{errand.status().pid}/environ").read_bytes()
    assert b"secret-HF_READ_TOKEN" in environment
    assert not any(other in environment for other in (b"secret-HF_TOKEN", b"secret-RUNPOD", b"PASSWORD"))
    assert not any("secret-" in path.read_text() for path in errand.path.iterdir())


def test_a_full_disk_is_said_with_what_to_do(home, tmp_path):
    """A limit on file size stands for the disk, in the errand's own process."""
    file = tmp_path / "big.jsonl"
    file.write_text("".join(LINE % n for n in range(20_000)))
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))\n"
        "from jobs import errands; from katherine.settings import Home\n"
        "home = Home(Path(sys.argv[1]))\n"
        f"errand = errands.start(home, 'prepare', {{'paths': [sys.argv[2]], 'base': {bases.SMALL!r}}}, 'test')\n"
        "print(errand.id); errands.wait(home, errand.id, 60)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(home.root), str(file)], cwd=PROJECT, capture_output=True, text=True
    )
    status = errands.load(home, ran.stdout.strip()).status()
    assert status.state is State.failed and "Nothing was kept" in status.reason, (status, ran.stderr)


def test_an_unknown_kind_or_id_is_refused(home):
    with pytest.raises(NotFound, match="no kind of errand"):
        errands.start(home, "os.system", {}, "test")
    for wrong in ("nothing", "..", "", "a/b"):
        with pytest.raises(NotFound):
            errands.load(home, wrong)


def test_a_damaged_folder_stands_in_nobodys_way(home, tmp_path):
    broken = home.errands / "20260101-000000-fetch-abcdef"
    broken.mkdir(parents=True)
    (broken / "request.json").write_text("{")
    assert errands.everyone(home) == []
    assert ended(home, ask_prepare(home, files(tmp_path / "in"))).state is State.succeeded


def test_old_ones_are_forgotten_but_never_one_that_is_under_way(home, stalled, monkeypatch):
    lasting = downloading(ask_fetch(home))
    for number in range(60):
        past = home.errands / f"2020{number:04d}-000000-prepare-abcdef"
        past.mkdir()
        request = {"kind": "prepare", "request": {"n": number}, "who": "test", "created": f"2020-{number:04d}"}
        (past / "request.json").write_text(json.dumps(request))
        (past / "status.json").write_text(json.dumps({"state": "succeeded"}))
    monkeypatch.setattr(errands, "KEPT", 10)
    errands.start(home, "compare", {"first": "a", "second": "b"}, "test")
    there = {errand.id for errand in errands.everyone(home)}
    assert len(there) == 10 and lasting.id in there
    assert slot.is_held(home, f"errand-{lasting.id}")


def test_of_some_kinds_one_is_carried_out_at_a_time(home, stalled, monkeypatch):
    monkeypatch.setitem(errands.KINDS, "fetch", replace(errands.KINDS["fetch"], alone="path"))
    errand = downloading(ask_fetch(home))
    with pytest.raises(Busy, match="Another fetch errand is at work"):
        errands.start(home, "fetch", errand.request | {"note": "another"}, "test")
    assert errands.start(home, "fetch", errand.request, "test").id == errand.id
    errands.stop(home, errand.id)


def test_a_secret_that_was_pasted_into_a_request_is_not_kept(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_pastedByMistake")
    errand = ask_prepare(home, files(tmp_path / "in"), name="hf_pastedByMistake")
    assert not any(b"pastedByMistake" in path.read_bytes() for path in errand.path.iterdir())
    ended(home, errand)


def test_an_old_folder_that_was_half_removed_goes_too(home, tmp_path, monkeypatch):
    monkeypatch.setattr(errands, "KEPT", 0)
    half = home.errands / "20200101-000000-prepare-abcdef"
    half.mkdir(parents=True)
    (half / "request.json").write_text(json.dumps({"kind": "prepare", "request": {}, "who": "test", "created": "2020"}))
    assert ended(home, ask_prepare(home, files(tmp_path / "in"))).state is State.succeeded
    assert not half.exists()
