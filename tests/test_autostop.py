import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from test_pod import KEY, RunPod, runpod  # noqa: F401  (a fixture)

import app
from jobs import autostop, errands, queue, slot
from jobs.autostop import Phase, Settings
from katherine import pod, runs
from katherine.errors import KatherineError
from katherine.runs import Run, State
from katherine.settings import PROJECT, Home

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 30.0
LONG = {"of": 100_000, "seconds": 0.01}
# Seconds of countdown: over at once, or not within any test.
SHORT, ENDLESS = 0.2, 3600.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runpod: RunPod) -> Iterator[Home]:  # noqa: F811
    """A home on a pod's volume, with the tests' kinds of run and RunPod's API on this machine."""
    monkeypatch.setattr(queue, "WORKER", "practice")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)]))
    monkeypatch.setenv("KATHERINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KATHERINE_VOLUME", str(tmp_path))
    monkeypatch.setenv("RUNPOD_POD_ID", "pod4711")
    home = Home(tmp_path / "home")
    yield home
    for run, _ in queue.unfinished(home):
        queue.stop(home, run.id, kill=True)
    until(lambda: not slot.is_held(home, "supervisor"))
    for pid in countdowns(home):
        os.kill(pid, signal.SIGKILL)
    until(lambda: processes_of(home) == [])
    log = home.root / "supervisor.log"
    assert not log.exists() or log.read_text() == ""


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def processes_of(home: Home) -> list[int]:
    """Every process other than this one that was told to use this home."""
    return [
        pid
        for pid, environment in environments()
        if f"KATHERINE_HOME={home.root}".encode() in environment and pid != os.getpid()
    ]


def environments() -> Iterator[tuple[int, list[bytes]]]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                yield int(process.name), (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue


def countdowns(home: Home) -> list[int]:
    found = []
    for pid in processes_of(home):
        try:
            if b"jobs.autostop" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def enable(home: Home, seconds: float, retry_seconds: float = 0.05, stopping_seconds: float = 600) -> None:
    """As `configure` does, with a countdown shorter than it allows."""
    autostop.folder(home).mkdir(parents=True, exist_ok=True)
    chosen = Settings(True, seconds / 60, retry_seconds, stopping_seconds)
    runs.write_json(autostop.folder(home) / "settings.json", asdict(chosen))


def ask(home: Home, kind: str = "steps", **recipe: object) -> Run:
    return queue.submit(home, kind, recipe=recipe, who="test")


def phase(home: Home) -> Phase:
    return autostop.view(home).phase


def becomes(home: Home, wanted: Phase) -> autostop.View:
    until(lambda: phase(home) is wanted)
    return autostop.view(home)


def test_when_the_queue_has_run_empty_the_pod_is_stopped(home, runpod):  # noqa: F811
    enable(home, SHORT)
    run = ask(home, of=2)
    shown = becomes(home, Phase.accepted)
    assert runpod.asked == [("POST", "/v1/pods/pod4711/stop", f"Bearer {KEY}")]
    assert run.status().state is State.succeeded
    assert not shown.can_cancel and not shown.loud
    assert "counting: The queue is empty; the last run" in (autostop.folder(home) / "log.txt").read_text()


def test_it_is_off_unless_somebody_turned_it_on(home, runpod):  # noqa: F811
    run = ask(home, of=1)
    assert queue.wait(home, run.id, PATIENCE).state is State.succeeded
    until(lambda: not slot.is_held(home, "supervisor"))
    until(lambda: processes_of(home) == [])
    assert phase(home) is Phase.off and runpod.asked == []


def test_a_countdown_shows_the_time_left_and_why_and_anyone_can_cancel_it(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    run = ask(home, of=1)
    shown = becomes(home, Phase.counting)
    assert 3500 < shown.left <= 3600 and shown.can_cancel
    assert shown.reason == f"The queue is empty; the last run, {run.id}, succeeded."
    assert autostop.words(shown).startswith(("Stopping this pod in 59 min", "Stopping this pod in 1 h"))
    autostop.cancel(home, "the reviewer")
    shown = becomes(home, Phase.cancelled)
    assert autostop.words(shown) == "Not stopping this pod. Kept running by the reviewer."
    until(lambda: countdowns(home) == [])
    assert runpod.asked == []
    with pytest.raises(KatherineError, match="nothing to cancel"):
        autostop.cancel(home, "the reviewer")
    autostop.acknowledge(home)
    assert phase(home) is Phase.waiting


def test_a_cancelled_countdown_does_not_cancel_the_next_one(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    autostop.cancel(home, "the operator")
    becomes(home, Phase.cancelled)
    until(lambda: countdowns(home) == [])
    enable(home, SHORT)
    ask(home, of=2)
    becomes(home, Phase.accepted)
    assert len(runpod.asked) == 1


def test_new_work_ends_the_countdown_and_its_end_begins_another(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    second = ask(home, **LONG)
    shown = becomes(home, Phase.cancelled)
    assert shown.reason.startswith(f"Run {second.id} ") and "the pod is in use" in shown.reason
    until(lambda: countdowns(home) == [])
    until(lambda: second.status().state is State.running)
    queue.stop(home, second.id)
    shown = becomes(home, Phase.counting)
    assert f"the last run, {second.id}, was stopped" in shown.reason
    assert runpod.asked == []


def test_turning_it_off_ends_the_countdown(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    autostop.configure(home, False)
    until(lambda: countdowns(home) == [])
    assert "cancelled: Auto-stop was turned off." in (autostop.folder(home) / "log.txt").read_text()
    assert runpod.asked == []


def test_an_errand_under_way_keeps_the_pod(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    errand = errands._create(home, "prepare", {}, "test")
    with slot.bind(home, errands._place(errand)):
        ask(home, of=1)
        shown = becomes(home, Phase.cancelled)
    assert shown.reason == f"Errand {errand.id} is under way: the pod is in use."
    assert runpod.asked == []


def test_a_failed_run_stops_the_pod_too_and_is_told(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, "fail", how="data")
    assert "FAILED (talk.jsonl, line 3: no messages. Mend the line)" in becomes(home, Phase.counting).reason


def test_a_run_that_waits_for_an_interrupted_one_does_not_keep_the_pod(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    parent = ask(home, **LONG)
    child = queue.submit(home, "steps", recipe={"of": 7}, who="test", parent=parent.id)
    until(lambda: parent.status().state is State.running and parent.status().pid)
    os.killpg(parent.status().pid, signal.SIGKILL)
    shown = becomes(home, Phase.counting)
    assert "except 1 that wait for an interrupted run" in shown.reason and "was interrupted" in shown.reason
    time.sleep(1.5)  # longer than it takes the countdown to look again
    assert child.status().state is State.queued and phase(home) is Phase.counting


def test_a_refusal_is_shouted_until_somebody_has_seen_it_and_not_repeated(home, runpod):  # noqa: F811
    runpod.status = 401
    enable(home, SHORT)
    ask(home, of=1)
    shown = becomes(home, Phase.refused)
    assert shown.loud and "HTTP 401" in shown.reason and "goes on costing money" in shown.reason
    until(lambda: countdowns(home) == [])
    assert len(runpod.asked) == 1
    assert "refused: RunPod refused to stop the pod: HTTP 401" in (autostop.folder(home) / "log.txt").read_text()
    assert phase(home) is Phase.refused
    autostop.acknowledge(home)
    assert phase(home) is Phase.waiting


def test_an_api_in_trouble_is_asked_again_before_it_is_called_a_refusal(home, runpod):  # noqa: F811
    runpod.status = 503
    enable(home, SHORT)
    ask(home, of=1)
    assert "HTTP 503" in becomes(home, Phase.refused).reason
    assert len(runpod.asked) == 1 + autostop.RETRIES


def test_an_api_that_comes_back_stops_the_pod(home, runpod):  # noqa: F811
    runpod.status = 503
    enable(home, SHORT, retry_seconds=1)
    ask(home, of=1)
    until(lambda: runpod.asked)
    runpod.status = 200
    becomes(home, Phase.accepted)
    assert len(runpod.asked) == 2


def test_a_network_that_is_down_is_asked_again_and_can_be_cancelled_meanwhile(home, runpod, monkeypatch):  # noqa: F811
    monkeypatch.setenv("KATHERINE_RUNPOD_API", "http://127.0.0.1:9/v1")
    enable(home, SHORT, retry_seconds=600)
    ask(home, of=1)
    until(lambda: "could not be asked" in autostop.view(home).reason)
    assert phase(home) is Phase.stopping and autostop.view(home).can_cancel
    autostop.cancel(home, "the operator")
    becomes(home, Phase.cancelled)


def test_a_stop_that_is_accepted_and_does_not_happen_is_shouted(home, runpod):  # noqa: F811
    enable(home, SHORT, stopping_seconds=0.1)
    ask(home, of=1)
    shown = becomes(home, Phase.refused)
    assert "it still runs" in shown.reason and shown.loud


def test_a_countdown_whose_process_was_killed_is_said_not_to_have_been_carried_out(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    (pid,) = countdowns(home)
    os.kill(pid, signal.SIGKILL)
    shown = becomes(home, Phase.lost)
    assert shown.loud and "was not carried out" in shown.reason
    autostop.acknowledge(home)
    assert phase(home) is Phase.waiting


def test_a_pod_that_was_started_again_is_not_stopped_by_the_old_countdown(home, runpod, monkeypatch):  # noqa: F811
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    (pid,) = countdowns(home)
    os.kill(pid, signal.SIGKILL)
    until(lambda: countdowns(home) == [])
    monkeypatch.setattr(queue, "machine", lambda: "another boot")
    assert phase(home) is Phase.waiting
    queue.reconcile(home)
    assert countdowns(home) == [] and runpod.asked == []


def test_a_second_countdown_is_not_started_beside_the_first(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    run = ask(home, of=1)
    becomes(home, Phase.counting)
    assert not autostop.begin(home, run.id)
    assert len(countdowns(home)) == 1


def test_it_goes_on_when_everything_that_asked_is_dead(home, runpod):  # noqa: F811
    """The asker stands for the web process: it is killed with its whole session while its run is under way."""
    enable(home, SHORT)
    code = (
        "from jobs import queue; from katherine.settings import home; queue.WORKER = 'practice'\n"
        "queue.submit(home(), 'steps', recipe={'of': 30, 'seconds': 0.02}, who='test')\n"
        "print('asked', flush=True)\n"
        "import time; time.sleep(60)"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True)
    assert asker.stdout is not None and asker.stdout.readline() == b"asked\n"
    os.killpg(asker.pid, signal.SIGKILL)
    asker.wait()
    asker.stdout.close()
    becomes(home, Phase.accepted)
    assert len(runpod.asked) == 1


def test_the_key_is_in_no_file_and_only_where_it_is_needed(home, runpod):  # noqa: F811
    enable(home, ENDLESS)
    first = ask(home, **LONG)
    until(lambda: first.status().state is State.running and first.status().pid and first.status().step)
    status = first.status()
    holding = {pid for pid, environment in environments() if f"{pod.KEY}={KEY}".encode() in environment}
    assert status.supervisor in holding and status.pid not in holding
    assert holding & set(processes_of(home)) == {status.supervisor}
    queue.stop(home, first.id)
    becomes(home, Phase.counting)
    until(lambda: not slot.is_held(home, "supervisor"))
    until(lambda: len(processes_of(home)) == 1)
    enable(home, SHORT)
    runpod.status, runpod.body = 401, f"no such key: {KEY}"
    autostop.cancel(home, "the operator")
    until(lambda: countdowns(home) == [])
    ask(home, of=1)
    becomes(home, Phase.refused)
    for path in home.root.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace"), path


def test_a_home_that_a_stop_would_wipe_is_not_stopped_and_that_is_shouted(home, runpod, monkeypatch):  # noqa: F811
    enable(home, SHORT)
    monkeypatch.setenv("KATHERINE_VOLUME", "/elsewhere")
    ask(home, of=1)
    shown = becomes(home, Phase.refused)
    assert "which a stop wipes" in shown.reason and "goes on costing money" in shown.reason
    assert runpod.asked == []


def test_turning_it_on_is_refused_where_it_could_not_work(home, monkeypatch):
    assert autostop.configure(home, True, 4) == Settings(True, 4.0)
    assert autostop.settings(home) == Settings(True, 4.0)
    assert autostop.configure(home, False) == Settings(False, 4.0)
    for minutes in (0, 0.5, 1000, float("nan")):
        with pytest.raises(KatherineError, match="1 to 720 minutes"):
            autostop.configure(home, True, minutes)
    monkeypatch.delenv(pod.KEY)
    with pytest.raises(KatherineError, match="RUNPOD_API_KEY is not in the environment"):
        autostop.configure(home, True)
    monkeypatch.setenv("KATHERINE_VOLUME", "/elsewhere")
    with pytest.raises(KatherineError, match="wipes"):
        autostop.configure(home, True)
    monkeypatch.delenv("RUNPOD_POD_ID")
    with pytest.raises(KatherineError, match="not a RunPod pod"):
        autostop.configure(home, True)
    autostop.configure(home, False)
    assert not autostop.settings(home).enabled


@pytest.mark.parametrize("text", ["", "[]", '{"enabled": 1}', '{"enabled": true, "minutes": -1}', '{"minutes": "x"}'])
def test_a_damaged_setting_is_off(home, text):
    autostop.folder(home).mkdir(parents=True)
    (autostop.folder(home) / "settings.json").write_text(text)
    (autostop.folder(home) / "state.json").write_text(text)
    assert autostop.settings(home) == Settings()
    assert phase(home) is Phase.off


def test_the_command_line_turns_it_on_and_off_and_cancels(home, runpod, capsys):  # noqa: F811
    def said(*arguments: str) -> str:
        app.main(["autostop", *arguments])
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert said() == "Auto-stop is off.\n"
    assert said("on", "--minutes", "3") == "Auto-stop is on: this pod stops 3 min after the queue has run empty.\n"
    assert said("cancel").startswith("error: Auto-stop is not counting down")
    enable(home, ENDLESS)
    ask(home, of=1)
    becomes(home, Phase.counting)
    assert said("status").startswith("Stopping this pod in ")
    assert said("cancel") == "Not stopping this pod. Kept running by the command line.\n"
    assert said("seen").startswith("Auto-stop is on")
    assert said("off") == "Auto-stop is off.\n"
    assert not autostop.settings(home).enabled
    assert json.loads((autostop.folder(home) / "state.json").read_text())["phase"] == "cancelled"
