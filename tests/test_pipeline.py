"""The stages together, as queued runs with real workers: the published Qwen3.5 form from files to an answer, with the
machine dying on the way."""

import os
import signal
import time

import msgspec
import pytest
from given import REPLIES

from jobs import pipeline, queue
from katherine import corpus, export, runs
from katherine.engines import Engine
from katherine.examples import Message
from katherine.runs import State
from katherine.template import ChatTemplate

# A worker imports torch and trl first, which takes up to a minute on two busy cores.
PATIENCE = 240


@pytest.fixture
def dataset(katherine_home, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    talks = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in REPLIES.items()
    ]
    pairs = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": said}],
            "rejected": [{"role": "assistant", "content": "As an AI, I cannot say."}],
            "_cat": "self",
            "_type": "denial",
        }
        for asked, said in REPLIES.items()
    ]
    for name, rows in (("talk.jsonl", talks), ("pairs.jsonl", pairs)):
        (files / name).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return corpus.prepare([files], katherine_home, name="pipeline")


def wait_for_step(run, step: int) -> runs.Status:
    for _ in range(PATIENCE * 10):
        status = run.status()
        if status.step >= step or status.state in runs.ENDED:
            return status
        time.sleep(0.1)
    raise AssertionError(f"{run.id} made no step {step}: {status}")


def test_the_published_form_goes_from_files_to_an_answer_though_it_is_killed_on_the_way(
    katherine_home, tiny_qwen, dataset
):
    common = {"per_device_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    sft, dpo, exported = pipeline.start(
        katherine_home,
        dataset.id,
        sft=common | {"base": str(tiny_qwen), "load_in_4bit": False, "lora_r": 4, "lora_alpha": 8, "save_steps": 2},
        dpo=common | {"num_train_epochs": 1},
        export={"quants": ["q4_k_m"], "check_examples": 2, "check_tokens": 64, "max_new_tokens": 8},
        who="test",
    )
    killed = wait_for_step(sft, 5)
    assert killed.state is State.running and killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    status = queue.wait(katherine_home, sft.id, PATIENCE)
    assert status.state is State.interrupted and "SIGKILL" in status.reason
    assert dpo.status().state is State.queued

    queue.resume(katherine_home, sft.id)
    for run in (sft, dpo, exported):
        status = queue.wait(katherine_home, run.id, PATIENCE)
        assert status.state is State.succeeded, (status, run.log.read_text()[-3000:])
    assert sft.status().attempt == 2
    steps = [row["step"] for row in sft.metrics() if "loss" in row]
    assert sorted(set(steps)) == list(range(1, 16))
    assert runs.result(sft)["steps"] == 15
    assert runs.result(dpo)["first_loss"] == pytest.approx(0.693147, abs=1e-6)

    (made,) = runs.result(exported)["files"]
    failed = {check["name"] for check in made["checks"] if not check["passed"]}
    # Random weights never learn to end, and a fifteen-step adapter cannot teach them; all else must hold.
    assert failed <= {"ends", "kl"}, made["checks"]
    assert made["accepted"] is (not failed)
    assert len(export.offered(exported.out / "gguf" / export.MANIFEST)) == (not failed)
    template = ChatTemplate.load(tiny_qwen)
    with Engine(exported.out / "gguf" / made["file"]) as engine:
        assert engine.meta()["architecture"] == "qwen35"
        reply = engine.complete(template.prompt([Message("user", "Who are you?")]), max_new_tokens=12)
        assert reply.finish.tokens > 0
