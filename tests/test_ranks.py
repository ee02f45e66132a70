"""One training in two processes on a CPU, with the real worker, the real trainers and real kills: the same steps and
losses as in one, one writer, and an end in words whichever process fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_sft import tiny_recipe

from jobs import queue
from katherine import model, ranks, runs
from katherine.ranks import Rank
from katherine.runs import Run
from katherine.settings import PROJECT, Home

PATIENCE = 60.0
PATH = [str(PROJECT), str(PROJECT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
# With a pause in every step.
SLOWLY = "practice_ranks"
# A hundred and fifty steps.
LONG = {"num_train_epochs": 50, "gradient_accumulation_steps": 1}


@dataclass
class Worker:
    """A worker and what it told its supervisor, which this process is."""

    run: Run
    process: subprocess.Popen
    report: int
    log: Path
    told: list[dict[str, Any]] = field(default_factory=list)

    def wait(self, patience: float = PATIENCE) -> dict[str, Any]:
        """How it said it ended."""
        self.process.wait(patience)
        with os.fdopen(self.report) as lines:
            self.told = [json.loads(line) for line in lines]
        return self.told[-1] if self.told else {}

    def losses(self, name: str = "loss") -> dict[int, float]:
        return {row["step"]: row[name] for row in self.run.metrics() if name in row}

    def followers(self) -> list[int]:
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    command = (process / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"jobs.follower" in command and str(self.run.path).encode() in command:
                    found.append(int(process.name))
        return found


@pytest.fixture
def home(tmp_path: Path, katherine_home: Home, tiny_dataset: Path) -> Home:
    made = Home(tmp_path / "home")
    made.cache.mkdir(parents=True)
    for part in katherine_home.cache.iterdir():
        (made.cache / part.name).symlink_to(part)
    shutil.copytree(tiny_dataset, made.datasets / "tiny")
    return made


@contextmanager
def begun(home: Home, run: Run, gpus: int, module: str = "jobs.worker") -> Iterator[Worker]:
    reading, writing = os.pipe()
    log = run.path / "worker.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, str(run.path), "--report", str(writing)),
                *("--supervisor", str(os.getpid()), "--gpus", *map(str, range(gpus))),
            ],
            pass_fds=(writing,),
            process_group=0,
            stdout=out,
            stderr=out,
            cwd=PROJECT,
            env=os.environ
            | {
                "KATHERINE_HOME": str(home.root),
                "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
                "OMP_NUM_THREADS": "1",
            },
        )
    os.close(writing)
    try:
        yield Worker(run, process, reading, log)
    finally:
        process.kill()
        process.wait()


def asked(home: Home, base: Path, **changes: Any) -> Run:
    recipe = tiny_recipe(base, **{"fit": True, "lora_dropout": 0.0} | changes).model_dump(mode="json")
    return runs.create(home, "sft", recipe=recipe, who="test", dataset="tiny")


def carried_out(home: Home, run: Run, gpus: int, module: str = "jobs.worker", patience: float = PATIENCE) -> Worker:
    with begun(home, run, gpus, module) as worker:
        assert worker.wait(patience) == {"end": "succeeded"}, worker.log.read_text()
        return worker


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.out / "adapter" / "adapter_model.safetensors")


def learned_alike(one: Run, other: Run) -> bool:
    """Weight by weight where the base is in float32. A processor with arithmetic for bfloat16 loads it in that, whose
    rounding Adam makes as large as a step where a gradient is near nought: there what was learned as a whole, the
    adapters' B, which begin at nought. Rounding sets it 0.014 apart at most; where one process keeps its gradients to
    itself it is 0.55."""
    ours, theirs = weights(one), weights(other)
    learned = [name for name in theirs if "lora_B" in name]
    assert set(ours) == set(theirs) and learned
    far = sum((ours[name] - theirs[name]).norm() ** 2 for name in learned)
    apart = (far / sum(theirs[name].norm() ** 2 for name in learned)).sqrt().item()
    if model.compute_type() is not torch.float32:
        return apart < 0.05
    each = (torch.allclose(ours[name].float(), theirs[name].float(), atol=2e-4, rtol=2e-2) for name in theirs)
    return apart < 0.05 and all(each)


def test_a_steps_units_are_shared_evenly_and_each_has_one_owner():
    sizes = [7, 90, 3, 41, 40, 39, 12, 1]
    shares = [ranks.share(sizes, int, Rank(index, 3)) for index in range(3)]
    assert sorted(unit for share in shares for unit in share) == sorted(sizes)
    assert max(map(sum, shares)) - min(map(sum, shares)) <= max(sizes) - 41 + 12
    assert ranks.share([5], int, Rank(1, 2)) == []


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen"])
def test_two_processes_make_the_steps_of_one(home, base, request):
    base = request.getfixturevalue(base)
    one = carried_out(home, asked(home, base, held_out=0.3, num_train_epochs=6), 1)
    two = carried_out(home, asked(home, base, held_out=0.3, num_train_epochs=6), 2)
    assert list(two.losses()) == list(one.losses()) and len(one.losses()) > 3
    assert list(two.losses().values()) == pytest.approx(list(one.losses().values()), rel=2e-3)
    assert one.losses("eval_loss") and two.losses("eval_loss") == pytest.approx(one.losses("eval_loss"), rel=2e-3)
    assert learned_alike(two.run, one.run)
    # The follower wrote nothing, and every number is of both.
    assert len(list(two.run.metrics())) == len(list(one.run.metrics()))
    assert runs.result(two.run)["steps"] == runs.result(one.run)["steps"]
    hardware = json.loads((two.run.path / "hardware.json").read_bytes())
    assert hardware["used"] == 2
    assert two.followers() == []


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_stop_keeps_the_step_that_all_made_and_as_many_as_there_are_go_on(home, tiny_llama, first, then):
    whole = carried_out(home, asked(home, tiny_llama, num_train_epochs=20, save_steps=50), 1)
    run = asked(home, tiny_llama, num_train_epochs=20, save_steps=50)
    with begun(home, run, first, SLOWLY) as worker:
        until(lambda: len(worker.losses()) >= 2)
        queue.control(run).write_text("keep")
        assert worker.wait() == {"end": "stopped"}, worker.log.read_text()
        assert worker.process.returncode == 0 and worker.followers() == []
    made = max(worker.losses())
    assert made < 40 and (run.out / "checkpoints" / f"checkpoint-{made}").is_dir()
    assert not (run.out / "adapter").exists()
    queue.control(run).unlink()
    resumed = carried_out(home, run, then)
    assert resumed.losses() == pytest.approx(whole.losses(), rel=5e-3, abs=2e-3)


def test_what_two_kept_two_resume(home, tiny_llama):
    # With dropout, whose random numbers are each process's own.
    run = asked(home, tiny_llama, **LONG, save_steps=5, lora_dropout=0.2)
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: (run.out / "checkpoints" / "checkpoint-5").is_dir())
        # As the supervisor does, when it is to be quick.
        os.killpg(worker.process.pid, signal.SIGKILL)
        until(lambda: worker.followers() == [])
    before = list(run.metrics())
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: len(list(run.metrics())) > len(before) + 3)
        queue.control(run).write_text("keep")
        assert worker.wait() == {"end": "stopped"}, worker.log.read_text()
    again = list(run.metrics())[len(before) :]
    assert again[0]["step"] > 5
    logged = {row["step"]: row["loss"] for row in before}
    made_twice = [row for row in again if row["step"] in logged]
    assert all(row["loss"] == logged[row["step"]] for row in made_twice)


def test_a_damaged_checkpoint_is_found_by_both_and_passed_over(home, tiny_llama):
    run = asked(home, tiny_llama, **LONG, save_steps=5)
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: len(worker.losses()) > 12)
        queue.control(run).write_text("keep")
        worker.wait()
    queue.control(run).unlink()
    kept = sorted((run.out / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    weights = kept[-1] / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    before = len(list(run.metrics()))
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: len(list(run.metrics())) > before)
        queue.control(run).write_text("keep")
        assert worker.wait() == {"end": "stopped"}, worker.log.read_text()
    assert list(run.metrics())[before]["step"] == int(kept[-2].name.split("-")[1]) + 1


def test_a_process_without_memory_has_the_step_done_again_by_all(home, tiny_llama):
    one = carried_out(home, asked(home, tiny_llama), 1)
    run = asked(home, tiny_llama)
    (run.out / "mishap").write_text("no memory")
    two = carried_out(home, run, 2, SLOWLY)
    assert list(two.losses().values()) == pytest.approx(list(one.losses().values()), rel=2e-3)
    assert learned_alike(two.run, one.run)


def test_processes_that_read_other_steps_are_found_out(home, tiny_llama):
    run = asked(home, tiny_llama)
    (run.out / "mishap").write_text("other examples")
    with begun(home, run, 2, SLOWLY) as worker:
        end = worker.wait()
    assert end["end"] == "failed" and "do not read the same steps" in end["reason"]
    assert worker.losses() == {}


def test_a_lost_follower_ends_the_run_in_words(home, tiny_llama):
    run = asked(home, tiny_llama, **LONG)
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: len(worker.losses()) >= 2)
        (follower,) = worker.followers()
        os.kill(follower, signal.SIGKILL)
        end = worker.wait()
    assert end["end"] == "failed" and "GPU 1 was ended (SIGKILL)" in end["reason"] and "Resume it" in end["remedy"]


@pytest.mark.parametrize(("mishap", "line"), [("follower fails", 3), ("follower hangs the leader", 4)])
def test_a_follower_says_why_it_failed(home, tiny_llama, mishap, line):
    run = asked(home, tiny_llama)
    (run.out / "mishap").write_text(mishap)
    with begun(home, run, 2, SLOWLY) as worker:
        end = worker.wait()
    assert worker.process.returncode == 1
    assert end == {
        "end": "failed",
        "reason": f"talk.jsonl, line {line}: no messages. Mend the line. (GPU 1)",
        "remedy": "",
    }


def test_a_leader_that_dies_takes_its_followers_with_it(home, tiny_llama):
    run = asked(home, tiny_llama, **LONG)
    with begun(home, run, 2, SLOWLY) as worker:
        until(lambda: len(worker.losses()) >= 1)
        assert len(worker.followers()) == 1
        worker.process.kill()
        until(lambda: worker.followers() == [])


def test_what_cannot_be_shared_is_done_by_the_leader_alone(home, tiny_llama):
    recipe = tiny_recipe(tiny_llama, fit=False).model_dump(mode="json")
    worker = carried_out(home, runs.create(home, "sft", recipe=recipe, who="test", dataset="tiny"), 2)
    assert len(worker.losses()) == 6 and worker.followers() == []
