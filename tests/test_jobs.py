import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jobs import pipeline, queue, slot, supervisor, worker
from jobs.supervisor import Log
from katherine import runs, scratch
from katherine.errors import Busy, DataError, KatherineError, NotFound, RecipeError
from katherine.progress import Quiet
from katherine.runs import ENDED, Run, State
from katherine.settings import PROJECT, Home

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 20.0
LONG = {"of": 100_000, "seconds": 0.01}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setattr(queue, "WORKER", "practice")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)]))
    monkeypatch.setenv("KATHERINE_HOME", str(tmp_path / "home"))
    home = Home(tmp_path / "home")
    yield home
    for run, _ in queue.unfinished(home):
        queue.stop(home, run.id, kill=True)
    until(lambda: not any(slot.is_held(home, name) for name in ("supervisor", "gpu-0", "gpu-1")))
    until(lambda: processes_of(home) == [])
    log = home.root / "supervisor.log"
    assert not log.exists() or log.read_text() == ""


@pytest.fixture
def two_cards(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with two cards, for the processes that are started."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests" / "two_cards"), os.environ["PYTHONPATH"]]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def processes_of(home: Home) -> list[int]:
    """Every process other than this one that was told to use this home."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if f"KATHERINE_HOME={home.root}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def ask(home: Home, kind: str = "steps", **recipe: object) -> Run:
    return queue.submit(home, kind, recipe=recipe, who="test")


def under_way(run: Run, step: int = 1) -> Run:
    until(lambda: run.status().state is State.running and run.status().step >= step)
    return run


def ended(home: Home, run: Run) -> runs.Status:
    status = queue.wait(home, run.id, PATIENCE)
    assert status.state in ENDED
    return status


def is_alive(pid: int) -> bool:
    return queue.ticks(pid) is not None


def in_another_process(code: str) -> subprocess.Popen:
    """In a session of its own, as from another terminal, with the preamble that the tests' kinds need."""
    preamble = "from jobs import queue; from katherine.settings import home; queue.WORKER = 'practice'\n"
    command = [sys.executable, "-c", preamble + code]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True)


def test_what_a_killed_run_left_in_memory_goes_with_its_end(home):
    left = scratch.SHARED_MEMORY / f"katherine-scratch-{home.root.parent.name}-{os.getpid()}"
    left.mkdir()
    try:
        run = under_way(ask(home, **LONG))
        os.kill(run.status().pid, signal.SIGKILL)
        assert ended(home, run).state is State.interrupted
        until(lambda: not left.exists())
    finally:
        shutil.rmtree(left, ignore_errors=True)


def test_a_run_goes_from_queued_to_succeeded_and_keeps_its_result(home):
    run = ask(home, of=3)
    status = ended(home, run)
    assert (status.state, status.step, status.of, status.attempt) == (State.succeeded, 3, 3, 1)
    assert status.exit_code == 0 and status.pid is None
    assert runs.result(run) == {"first": 1, "last": 3}
    rows = list(run.metrics())
    assert [(row["step"], row["loss"], row["attempt"]) for row in rows] == [(1, 0.0, 1), (2, 0.0, 1), (3, 0.0, 1)]


def test_a_recipe_is_frozen_with_its_defaults_and_the_datasets_fingerprint(home):
    (home.datasets / "talk").mkdir(parents=True)
    (home.datasets / "talk" / "report.json").write_text('{"fingerprint": "abc"}')
    run = queue.submit(home, "steps", recipe={}, who="test", dataset="talk", start=False)
    assert run.record.recipe == {"of": 3}
    assert run.record.inputs == {"dataset": "abc"}
    assert not slot.is_held(home, "supervisor")


def test_what_cannot_be_run_is_refused_before_it_is_queued(home):
    with pytest.raises(NotFound, match=r"kind of run 'os\.system'"):
        ask(home, "os.system")
    with pytest.raises(NotFound, match="no dataset 'absent'"):
        queue.submit(home, "steps", recipe={}, who="test", dataset="absent")
    with pytest.raises(NotFound, match="no run 'absent'"):
        queue.submit(home, "steps", recipe={}, who="test", parent="absent")
    assert runs.everyone(home) == []


def test_a_bad_recipe_anywhere_in_a_pipeline_queues_nothing(home, monkeypatch):
    monkeypatch.setattr(queue, "WORKER", "jobs.worker")
    (home.datasets / "talk").mkdir(parents=True)
    with pytest.raises(RecipeError, match="beta"):
        pipeline.start(home, "talk", {}, {"beta": -1}, {}, "test")
    assert runs.everyone(home) == []


def test_killing_the_process_that_asked_and_its_whole_terminal_does_not_kill_the_run(home):
    asker = in_another_process(
        "run = queue.submit(home(), 'steps', recipe={'of': 60, 'seconds': 0.02}, who='test')\n"
        "print(run.id, flush=True)\n"
        "import time; time.sleep(60)"
    )
    run = runs.load(home, asker.stdout.readline().decode().strip())
    under_way(run)
    os.killpg(asker.pid, signal.SIGKILL)
    asker.wait()
    assert run.status().state is State.running
    assert ended(home, run).state is State.succeeded


def test_a_hundred_simultaneous_starts_make_one_run(home):
    begin = home.root / "begin"
    home.root.mkdir()
    askers = [
        in_another_process(
            "import threading, time, pathlib\n"
            f"begin = pathlib.Path({str(begin)!r})\n"
            "def ask():\n"
            "    while not begin.exists(): time.sleep(0.001)\n"
            "    run = queue.submit(home(), 'steps', recipe={'of': 100000, 'seconds': 0.01}, who='test')\n"
            "    print(run.id + chr(10), end='')\n"
            "threads = [threading.Thread(target=ask) for _ in range(25)]\n"
            "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
        )
        for _ in range(4)
    ]
    time.sleep(0.3)
    begin.touch()
    ids = [line for asker in askers for line in asker.communicate(timeout=PATIENCE)[0].split()]
    assert len(ids) == 100 and len(set(ids)) == 1
    assert [run.id for run in runs.everyone(home)] == [ids[0].decode()]
    run = under_way(runs.everyone(home)[0])
    supervisors = [pid for pid in processes_of(home) if b"jobs.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert supervisors == [run.status().supervisor]


def test_another_request_is_another_run_and_waits_its_turn(home):
    first, second = ask(home, of=50, seconds=0.02), ask(home, of=2)
    assert first.id != second.id
    under_way(first)
    assert second.status().state is State.queued
    assert ended(home, second).state is State.succeeded
    assert first.status().ended <= second.status().started


def test_an_ended_request_can_be_made_again(home):
    first = ask(home, of=1)
    ended(home, first)
    second = ask(home, of=1)
    assert first.id != second.id
    assert ended(home, second).state is State.succeeded


def test_stop_keeps_the_work_and_resume_goes_on_from_it(home):
    run = under_way(ask(home, of=60, seconds=0.02), step=3)
    queue.stop(home, run.id)
    status = ended(home, run)
    assert status.state is State.cancelled
    assert status.reason == f"Stopped by you; kept at step {status.step}."
    assert int((run.out / "kept").read_text()) == status.step

    assert queue.resume(home, run.id) == run
    again = ended(home, run)
    assert (again.state, again.attempt, again.reason) == (State.succeeded, 2, "")
    assert runs.result(run)["first"] == status.step + 1
    assert [row["step"] for row in run.metrics()] == list(range(1, 61))


def test_stopping_is_shown_while_a_run_is_stopping_and_kill_follows_keep(home):
    run = under_way(ask(home, "stubborn"))
    queue.stop(home, run.id)
    until(lambda: run.status().state is State.stopping)
    pid = run.status().pid
    os.killpg(pid, signal.SIGCONT)  # it is a group of its own, and there
    queue.stop(home, run.id, kill=True)
    queue.stop(home, run.id)  # which must not take the kill back
    status = ended(home, run)
    assert status.state is State.cancelled and status.exit_code == -signal.SIGKILL
    assert status.reason == "Stopped by you and killed at step 1."
    assert not is_alive(pid)


def test_kill_ends_every_process_of_the_run_and_no_other(home):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run = under_way(ask(home, "child", **LONG))
    pids = json.loads((run.out / "pids").read_text())
    assert all(is_alive(pid) for pid in pids)
    queue.stop(home, run.id, kill=True)
    assert ended(home, run).state is State.cancelled
    assert not any(is_alive(pid) for pid in pids)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_what_a_finished_worker_leaves_behind_is_ended(home):
    run = ask(home, "child", of=1)
    assert ended(home, run).state is State.succeeded
    assert not any(is_alive(pid) for pid in json.loads((run.out / "pids").read_text()))


def test_a_queued_run_is_cancelled_at_once_and_its_children_with_it(home):
    first = under_way(ask(home, **LONG))
    parent = ask(home, of=1)
    child = queue.submit(home, "steps", recipe={}, who="test", parent=parent.id)
    grandchild = queue.submit(home, "steps", recipe={}, who="test", parent=child.id)
    assert queue.stop(home, parent.id).state is State.cancelled
    assert parent.status().reason == "Stopped by you before it began."
    assert child.status().reason == f"Run {parent.id}, which it builds on, was cancelled."
    assert grandchild.status().state is State.cancelled
    assert first.status().state is State.running


def test_a_child_of_a_failed_parent_is_cancelled_and_says_why(home):
    parent = ask(home, "fail", how="data")
    child = queue.submit(home, "steps", recipe={}, who="test", parent=parent.id)
    assert ended(home, child).state is State.cancelled
    assert child.status().reason == f"Run {parent.id}, which it builds on, was failed."
    with pytest.raises(KatherineError, match=f"builds on run {parent.id}, which was failed. Resume that one first"):
        queue.resume(home, child.id)


def test_a_pipeline_runs_in_order_each_the_next_ones_parent(home):
    (home.datasets / "talk").mkdir(parents=True)
    queued = pipeline.start(home, "talk", {}, {}, {}, "test", probe={})
    assert [run.record.kind for run in queued] == ["sft", "dpo", "export", "probe"]
    assert [run.record.parent for run in queued] == [None, *(run.id for run in queued[:-1])]
    ends = [ended(home, run) for run in queued]
    assert {status.state for status in ends} == {State.succeeded}
    assert all(before.ended <= after.started for before, after in pairwise(ends))


def test_a_pipeline_without_dpo_exports_the_sft_run(home):
    (home.datasets / "talk").mkdir(parents=True)
    sft, export = pipeline.start(home, "talk", {}, None, {}, "test")
    assert export.record.parent == sft.id
    assert ended(home, export).state is State.succeeded


def test_a_pipeline_started_twice_is_one(home):
    (home.datasets / "talk").mkdir(parents=True)
    first = pipeline.start(home, "talk", LONG, {}, {}, "test")
    assert pipeline.start(home, "talk", LONG, {}, {}, "test") == first
    assert len(runs.everyone(home)) == 3


def test_a_dataset_changed_since_the_request_is_noticed(home):
    (home.datasets / "talk").mkdir(parents=True)
    report = home.datasets / "talk" / "report.json"
    report.write_text('{"fingerprint": "abc"}')
    run = queue.submit(home, "sft", recipe={}, who="test", dataset="talk", start=False)
    report.write_text('{"fingerprint": "abd"}')
    with pytest.raises(DataError, match=f"talk has changed since run {run.id} was asked for"):
        worker.KINDS["sft"].work(home, run, Quiet())
    queue.stop(home, run.id)


def test_a_run_knows_the_adapters_it_comes_from_in_the_order_of_training(home):
    (home.datasets / "talk").mkdir(parents=True)
    sft, dpo, export, probe = pipeline.start(home, "talk", {}, {}, {}, "test", probe={})
    ended(home, probe)
    for run in (sft, dpo):
        (run.out / "adapter").mkdir()
    assert list(worker.adapters(home, probe).items()) == [("sft", sft.out / "adapter"), ("dpo", dpo.out / "adapter")]
    assert list(worker.adapters(home, dpo)) == ["sft"]
    assert worker.adapters(home, sft) == {}
    assert export.id == probe.record.parent


def test_waiting_ends_at_its_limit_with_the_status_as_it_is(home):
    run = under_way(ask(home, **LONG))
    assert queue.wait(home, run.id, timeout=0).state is State.running


@pytest.mark.parametrize(
    ("how", "reason", "remedy"),
    [
        ("data", "talk.jsonl, line 3: no messages. Mend the line.", ""),
        ("gpu memory", "Out of GPU memory.", "per_device_batch_size 8 (it was 16) and gradient_accumulation_steps 4"),
        ("disk", "Disk full while writing /volume/checkpoint-50", "Free some room, then resume"),
        ("bug", "A bug: ZeroDivisionError: division by zero", "log.txt"),
        ("exit", "A bug: the worker left in phase starting with exit code 7.", "log.txt"),
        ("abort", "Native code crashed (SIGABRT)", "log.txt"),
    ],
)
def test_each_failure_says_what_happened_and_what_to_do(home, how, reason, remedy):
    run = ask(home, "fail", how=how, per_device_batch_size=16, gradient_accumulation_steps=2)
    status = ended(home, run)
    assert status.state is State.failed
    assert reason in status.reason and remedy in status.remedy
    assert status.exit_code == {"exit": 7, "abort": -signal.SIGABRT}.get(how, 1)
    if how in ("data", "bug", "abort"):
        assert "practice.py" in run.log.read_text()


def test_a_crash_after_the_result_does_not_undo_it(home):
    run = ask(home, "fail", how="crash after the result")
    status = ended(home, run)
    assert (status.state, status.exit_code) == (State.succeeded, -signal.SIGSEGV)


def test_a_worker_killed_from_outside_is_interrupted_and_resumes(home):
    run = under_way(ask(home, of=60, seconds=0.02), step=3)
    child = queue.submit(home, "steps", recipe={}, who="test", parent=run.id)
    os.kill(run.status().pid, signal.SIGKILL)
    status = ended(home, run)
    assert status.state is State.interrupted
    assert status.reason.startswith("Killed from outside (SIGKILL) at step")
    # What is queued behind it waits for it rather than being lost.
    assert queue.wait(home, child.id, PATIENCE).state is State.queued
    queue.resume(home, run.id)
    assert ended(home, child).state is State.succeeded
    assert runs.result(run)["first"] > 3


def test_a_killed_supervisor_takes_its_worker_along_and_the_run_can_be_resumed(home):
    run = under_way(ask(home, "child", of=60, seconds=0.02), step=3)
    before = run.status()
    os.kill(before.supervisor, signal.SIGKILL)
    until(lambda: not is_alive(before.pid))
    assert run.status().state is State.running  # nobody was left to say otherwise
    assert [found.id for found in queue.reconcile(home)] == [run.id]
    status = run.status()
    assert (status.state, status.reason) == (
        State.interrupted,
        "The machine went away or the process was killed.",
    )
    # Killed as well: what the worker had started, though nothing tied it to the worker's life.
    until(lambda: not any(is_alive(pid) for pid in json.loads((run.out / "pids").read_text())))
    assert queue.reconcile(home) == []
    queue.resume(home, run.id)
    again = ended(home, run)
    assert (again.state, again.attempt) == (State.succeeded, 2)
    assert runs.result(run)["first"] > 3


def test_a_worker_that_never_speaks_dies_with_its_supervisor(home):
    run = under_way(ask(home, "stubborn"))
    before = run.status()
    os.kill(before.supervisor, signal.SIGKILL)
    # The worker is ended with the supervisor's thread that started it, which is a moment before all of it has ended.
    until(lambda: not is_alive(before.pid) and not is_alive(before.supervisor))
    assert [found.id for found in queue.reconcile(home)] == [run.id]


def test_the_queue_goes_on_after_its_supervisor_was_killed(home):
    first, second = under_way(ask(home, **LONG)), ask(home, of=2)
    os.kill(first.status().supervisor, signal.SIGKILL)
    assert ended(home, second).state is State.succeeded
    assert first.status().state is State.interrupted


def test_a_worker_whose_supervisor_died_before_it_began_does_nothing(home):
    run = queue.submit(home, "steps", recipe={"of": 3}, who="test", start=False)
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    command = [sys.executable, "-m", "practice", str(run.path), "--report", "1", "--supervisor", str(nobody.pid)]
    assert subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL).returncode == 1
    assert not (run.out / "kept").exists()
    queue.stop(home, run.id)


def test_a_run_on_another_machine_is_interrupted_only_when_its_heartbeat_stops(home):
    run = queue.submit(home, "steps", recipe={}, who="test", start=False)
    run.set_status(state=State.running, machine="another", supervisor=1, supervisor_started=1, heartbeat=runs.now())
    assert queue.reconcile(home) == []
    run.set_status(heartbeat="2026-01-01T00:00:00.000+00:00")
    assert [found.id for found in queue.reconcile(home)] == [run.id]


def test_a_reused_pid_is_not_taken_for_the_supervisor(home):
    run = queue.submit(home, "steps", recipe={}, who="test", start=False)
    mine = queue.ticks(os.getpid())
    run.set_status(state=State.running, machine=queue.machine(), supervisor=os.getpid(), supervisor_started=mine)
    assert queue.reconcile(home) == []
    run.set_status(supervisor_started=mine - 1)
    assert [found.id for found in queue.reconcile(home)] == [run.id]


def test_a_supervisor_that_died_and_was_not_waited_for_is_dead(home):
    process = subprocess.Popen(["true"])
    until(lambda: queue.ticks(process.pid) is None)
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_an_ended_or_running_run_is_resumed_no_second_time(home):
    run = ask(home, of=1)
    ended(home, run)
    with pytest.raises(KatherineError, match="nothing to resume"):
        queue.resume(home, run.id)
    running = under_way(ask(home, **LONG))
    queue.resume(home, running.id)
    assert running.status().attempt == 1


def test_a_held_gpu_names_its_holder_and_a_run_queues_behind_it(home):
    chat = slot.take(home, "chat")
    held = rf"The machine is held by chat \(process {os.getpid()}\) since \d\d:\d\d UTC\."
    with pytest.raises(Busy, match=f"{held} Wait,"):
        slot.take(home, "export")
    run = ask(home, of=2)
    until(lambda: re.fullmatch(f"{held} Chat gives way within about a minute\\.", run.status().reason))
    chat.release()
    assert ended(home, run).reason == ""


def test_a_run_holds_the_gpu_and_is_named(home):
    run = under_way(ask(home, **LONG))
    with pytest.raises(Busy, match=rf"The machine is held by run {run.id} \(steps\) since"):
        slot.take(home, "chat")
    assert slot.holder(home).run == run.id
    # The worker has a hand on it too, so that it stays held should the supervisor alone be killed.
    held = {fd.readlink().name for fd in Path(f"/proc/{run.status().supervisor}/fd").iterdir()}
    also = {fd.readlink().name for fd in Path(f"/proc/{run.status().pid}/fd").iterdir()}
    assert [name for name in held & also if name.startswith("socket:")]
    slot.take(home, "chat", name="1").release()  # another GPU is another slot


def test_a_slot_is_free_once_its_holder_is_killed(home):
    holder = in_another_process(
        "from jobs import slot; import time\n"
        "held = slot.take(home(), 'chat'); print('held', flush=True); time.sleep(60)"
    )
    holder.stdout.readline()
    assert slot.holder(home).pid == holder.pid
    holder.kill()
    holder.wait()
    assert slot.holder(home) is None
    slot.take(home, "chat").release()


def test_a_slot_stays_held_while_a_child_that_inherited_it_lives(home):
    held = slot.take(home, "sft")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(held.fileno(),))
    held.release()
    assert slot.is_held(home, "gpu-0")
    child.kill()
    child.wait()
    assert not slot.is_held(home, "gpu-0")


def test_one_home_has_one_slot_by_whatever_path_it_is_named(home, tmp_path):
    home.root.mkdir()
    (tmp_path / "link").symlink_to(home.root)
    with slot.take(home, "chat"), pytest.raises(Busy):
        slot.take(Home(tmp_path / "link"), "chat")


def test_a_worker_lets_the_panel_go_first(home):
    run = under_way(ask(home, **LONG))
    worker_pid = run.status().pid
    assert os.getpriority(os.PRIO_PROCESS, worker_pid) == worker.NICENESS > os.getpriority(os.PRIO_PROCESS, 0)
    # A session's own, where the kernel shares the machine among sessions first.
    group = Path(f"/proc/{worker_pid}/autogroup")
    if group.exists() and (told := group.read_text()):
        assert told.endswith(f"nice {worker.NICENESS}\n") and told != Path("/proc/self/autogroup").read_text()


def test_two_gpus_carry_out_two_runs_at_once_and_each_sees_its_own(home, two_cards):
    first, second = under_way(ask(home, **LONG)), under_way(ask(home, of=100_001, seconds=0.01))
    third = ask(home, of=2)
    assert [(run.out / "gpus").read_text() for run in (first, second)] == ["0 of ['0']", "1 of ['1']"]
    assert slot.holder(home, "1").run == second.id
    assert first.status().supervisor == second.status().supervisor
    assert third.status().state is State.queued
    queue.stop(home, second.id)
    # On the card that was let go, and while the other goes on.
    assert ended(home, third).state is State.succeeded
    assert (third.out / "gpus").read_text() == "1 of ['1']"
    assert first.status().state is State.running
    child = queue.submit(home, "steps", recipe={"of": 3}, who="test", parent=first.id)
    queue.stop(home, first.id)
    assert child.status().state is State.cancelled


def test_what_builds_on_a_run_waits_for_it_though_another_gpu_is_idle(home, two_cards):
    stages = {"sft": {"of": 30, "seconds": 0.01}, "dpo": {"of": 2}}
    sft, dpo = queue.submit_chain(home, stages, who="test", dataset=None)
    assert ended(home, dpo).started >= sft.status().ended


def test_a_run_takes_the_gpu_that_a_chat_leaves(home, two_cards):
    with slot.take(home, "chat", name="0"):
        run = ask(home, of=2)
        assert ended(home, run).state is State.succeeded
        assert (run.out / "gpus").read_text() == "1 of ['1']"
        # Also while one of the cards is a run's.
        long = under_way(ask(home, **LONG))
        beside = ask(home, of=5)
        until(lambda: f"GPU 0 by chat (process {os.getpid()})" in beside.status().reason)
        # Not where it is: that would be written anew with each of its steps.
        assert f"GPU 1 by run {long.id} (steps) since" in beside.status().reason
        queue.stop(home, long.id)
        assert ended(home, beside).state is State.succeeded
        with slot.take(home, "chat", name="1"):
            waits = ask(home, of=4)
            until(lambda: "Every GPU is held: GPU 0 by chat" in waits.status().reason)
            assert "; GPU 1 by chat" in waits.status().reason
        assert ended(home, waits).reason == ""


def test_a_run_that_spreads_takes_every_gpu_that_no_other_waits_for(home, two_cards):
    alone = under_way(ask(home, "spread", **LONG))
    assert (alone.out / "gpus").read_text() == "0 of ['0', '1']"
    assert {slot.holder(home, name).run for name in ("0", "1")} == {alone.id}
    queue.stop(home, alone.id, kill=True)
    ended(home, alone)
    shared = queue.submit(home, "spread", recipe=LONG | {"again": True}, who="test", start=False)
    beside = ask(home, **LONG)
    for run, where in ((shared, "0 of ['0']"), (beside, "1 of ['1']")):
        assert (under_way(run).out / "gpus").read_text() == where


def test_a_run_that_cannot_be_watched_is_given_up_and_the_others_are_not(home, monkeypatch, capsys):
    class Blind(supervisor.Supervision):
        def watch(self) -> None:
            if self._run.id == lost.id:
                until((lost.out / "kept").exists)
                raise OSError("no more descriptors")
            super().watch()

    monkeypatch.setattr(supervisor, "Supervision", Blind)
    lost = queue.submit(home, "steps", recipe=LONG, who="test", start=False)
    other = queue.submit(home, "steps", recipe={}, who="test", start=False)
    place = slot.bind(home, "supervisor")
    supervisor.drain(home, place, "practice")
    status = lost.status()
    assert (status.state, status.pid) == (State.interrupted, None)
    assert "no more descriptors" in status.reason
    assert ended(home, other).state is State.succeeded
    assert "no more descriptors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (queue.next_runnable, OSError(errno.EIO, os.strerror(errno.EIO))),
        # As runs raises it for a status that cannot be read.
        (supervisor._begin, DataError("status.json is not there")),
    ],
)
def test_a_queue_that_cannot_be_read_while_a_run_is_watched_is_read_again(
    home, two_cards, monkeypatch, capsys, what, error
):
    monkeypatch.setattr(supervisor, "BUSY", 0.05)
    monkeypatch.setattr(supervisor.gpu, "usable", lambda: ("0", "1"))
    failures = []

    def moody(home: Home, *rest: Run) -> Run | bool | None:
        if len(failures) < 3 and first.status().state is State.running:
            failures.append(error)
            raise error
        return what(home, *rest)

    monkeypatch.setattr(sys.modules[what.__module__], what.__name__, moody)
    first, second = (
        queue.submit(home, "steps", recipe={"of": of, "seconds": 0.01}, who="test", start=False) for of in (50, 3)
    )
    place = slot.bind(home, "supervisor")
    supervisor.drain(home, place, "practice")
    assert len(failures) == 3 and capsys.readouterr().err.count("the queue cannot be read") == 3
    assert {first.status().state, second.status().state} == {State.succeeded}
    assert (second.out / "gpus").read_text() == "1 of ['1']"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
)
def test_an_end_that_cannot_be_written_yet_is_written_later_and_not_guessed(home, monkeypatch, capsys, error):
    monkeypatch.setattr(supervisor, "BUSY", 0.05)
    failures = []

    class Moody(supervisor.Supervision):
        def _save(self) -> None:
            if self._status.state is State.succeeded and len(failures) < 4:
                failures.append(error)
                raise error
            super()._save()

    monkeypatch.setattr(supervisor, "Supervision", Moody)
    above = queue.submit(home, "chatter", recipe={"lines": 2}, who="test", start=False)
    below = queue.submit(home, "steps", recipe={}, who="test", parent=above.id, start=False)
    supervisor.drain(home, slot.bind(home, "supervisor"), "practice")
    assert len(failures) == 4 and "cannot be written yet" in capsys.readouterr().err
    assert {above.status().state, below.status().state} == {State.succeeded}
    # The log gives way to a full disk alone.
    assert ("line 1" in above.log.read_text()) == (error.errno != errno.ENOSPC)


def test_where_the_queue_fails_at_the_last_the_pod_is_left_to_autostop_all_the_same(home, monkeypatch, capsys):
    begun, run = [], queue.submit(home, "steps", recipe={}, who="test", start=False)
    monkeypatch.setattr(supervisor.autostop, "begin", lambda home, after: begun.append(after))
    real = queue.next_runnable

    def gone(home: Home) -> Run | None:
        if run.status().state in ENDED:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(home)

    monkeypatch.setattr(queue, "next_runnable", gone)
    with slot.bind(home, "supervisor") as place, pytest.raises(OSError, match="Input/output"):
        supervisor.drain(home, place, "practice")
    assert begun == [run.id]


def test_a_run_of_which_nobody_knows_whether_it_spreads_runs_on_one_gpu(home, two_cards, monkeypatch, capsys):
    def unknown(home: Home, recipe: dict) -> bool:
        raise KeyError("text_config")

    monkeypatch.setattr(supervisor.gpu, "usable", lambda: ("0", "1"))
    kinds = queue.worker_module("practice").KINDS
    monkeypatch.setitem(kinds, "spread", replace(kinds["spread"], spreads=unknown))
    run = queue.submit(home, "spread", recipe={}, who="test", start=False)
    supervisor.drain(home, slot.bind(home, "supervisor"), "practice")
    assert run.status().state is State.succeeded and (run.out / "gpus").read_text() == "0 of ['0']"
    assert "KeyError: 'text_config'" in capsys.readouterr().err


def test_an_sft_is_shared_only_where_it_can_be(home, tmp_path):
    spreads = worker.KINDS["sft"].spreads
    assert spreads(home, {"fit": True, "base": "Qwen/Qwen3.5-9B"})
    assert not spreads(home, {"fit": False, "base": "Qwen/Qwen3.5-9B"})
    assert not spreads(home, {"fit": True, "base": "nobody/knows-it"})
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
    assert not spreads(home, {"fit": True, "base": str(tmp_path)})


def test_a_worker_sees_no_secret_that_its_kind_does_not_name(home, monkeypatch):
    for name in ("HF_TOKEN", "RUNPOD_API_KEY", "KATHERINE_OPERATOR_PASSWORD", "SOMEBODYS_SECRET"):
        monkeypatch.setenv(name, f"value-of-{name}")
    plain = under_way(ask(home, **LONG))
    seen = Path(f"/proc/{plain.status().pid}/environ").read_bytes()
    assert b"value-of-" not in seen and b"KATHERINE_HOME=" in seen
    queue.stop(home, plain.id, kill=True)
    trusted = under_way(ask(home, "trusted", **LONG))
    seen = Path(f"/proc/{trusted.status().pid}/environ").read_bytes()
    assert seen.count(b"value-of-") == 1 and b"HF_TOKEN=value-of-HF_TOKEN" in seen


def test_a_progress_bar_is_one_line_of_the_log(home):
    run = ask(home, "chatter", lines=2)
    ended(home, run)
    lines = run.log.read_text().splitlines()
    assert lines[0].startswith("--- attempt 1 begins") and lines[-1].startswith("--- succeeded")
    assert [line[:8].strip() for line in lines[1:-1]] == ["100%", "line 0 x", "line 1 x", "no end o"]


def test_the_log_is_capped_and_its_newest_lines_are_kept(tmp_path):
    log = Log(tmp_path / "log.txt", limit=1000)
    for number in range(1000):
        log.write(f"line {number}\r\n".encode())
    log.write(b"z" * 100_000)  # no end of line: written in pieces, not kept in memory
    log.close()
    both = (tmp_path / "log.1.txt").read_bytes(), (tmp_path / "log.txt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.1.txt", "log.txt"]
    assert both[0].splitlines()[-1] == b"line 999" and len(both[0]) <= 1000
    assert both[1] == b"z" * 100_000 + b"\n"


def test_a_torn_metrics_row_is_skipped_and_does_not_swallow_the_next(home):
    run = queue.submit(home, "steps", recipe={"of": 2}, who="test", start=False)
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    queue.wake(home)
    ended(home, run)
    assert [(row["step"], row["loss"]) for row in run.metrics()] == [(1, 0.5), (1, 0.0), (2, 0.0)]


def test_numbers_that_json_lacks_are_logged_as_text(home):
    run = queue.submit(home, "steps", recipe={}, who="test", start=False)
    worker.RunProgress(run, report=-1).metric(loss=float("nan"), rate=float("inf"), zero=0.0, absent=None)
    (row,) = run.metrics()
    assert (row["loss"], row["rate"], row["zero"], row["absent"]) == ("nan", "inf", 0.0, None)
    queue.stop(home, run.id)


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="needs a writable memory cgroup")
def test_a_worker_killed_by_a_memory_limit_says_so(home):
    run = ask(home, "eat")
    until(lambda: run.status().phase == "eat")
    group = Path("/sys/fs/cgroup/memory") / f"katherine-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("64000000")
        (group / "cgroup.procs").write_text(str(run.status().pid))
        (run.out / "go").touch()
        status = ended(home, run)
    finally:
        group.rmdir()
    assert status.state is State.failed
    assert status.reason == "Killed in phase eat by the host's memory limit."
    assert "take a machine with more memory" in status.remedy


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"fit": False, "per_device_batch_size": 16}, "Start again with fit on"),
        ({"fit": True, "per_device_batch_size": 16, "load_in_4bit": False}, "Start again with load_in_4bit on"),
        ({"fit": True, "per_device_batch_size": 4, "max_length": 1024}, "max_length below 1024"),
        ({"per_device_batch_size": 16, "gradient_accumulation_steps": 2}, "per_device_batch_size 8 (it was 16)"),
    ],
)
def test_a_shortage_of_memory_is_answered_with_the_setting_that_would_fit(home, recipe, said):
    run = runs.create(home, "sft", recipe=recipe, who="test")
    assert said in worker.lower(run, "or take a larger GPU")
