"""DPO on a CPU with the real trainer: its reference is the SFT model, it sees what chat will send, and it resumes."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from given import Told
from test_sft import PROJECT, tensors, tiny_recipe

from katherine import adapters, corpus, dpo, model, recipe, settings, sft, training
from katherine.errors import NotFound
from katherine.progress import Quiet
from katherine.template import ChatTemplate


def pair_recipe(**changes):
    """Five pairs, two a micro-batch, two of those a step: an epoch is 3 micro-batches and 2 steps."""
    values = {
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_ratio": 0.0,
        "save_steps": 1,
        "learning_rate": 1e-3,
    }
    return recipe.preset("demo", recipe.DpoRecipe, values | changes)


@pytest.fixture(scope="module")
def sft_adapter(tiny_llama, tiny_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sft")
    sft.train(tiny_dataset, tiny_recipe(tiny_llama, num_train_epochs=1), out, Quiet())
    # An adapter at its start changes nothing, and then the base would pass for the SFT model.
    assert all(value.any() for value in tensors(out / "adapter").values())
    return out / "adapter"


@pytest.fixture(scope="module")
def uninterrupted(sft_adapter, tiny_dataset, tmp_path_factory):
    told, out = Told(), tmp_path_factory.mktemp("dpo")
    return told, dpo.train(tiny_dataset, sft_adapter, pair_recipe(), out, told), out


def test_the_first_loss_is_ln_2_and_both_rewards_are_0_because_the_reference_is_the_sft_model(uninterrupted):
    told, result, _ = uninterrupted
    first = told.rows[0]
    # ln 2 in float32 is off by less than half of 2^-24 of its size; the mean of two micro-batches adds as much again.
    assert result["first_loss"] == first["loss"] == pytest.approx(math.log(2), abs=2**-23)
    # Exactly, not nearly: policy and reference are the same numbers through the same operations.
    assert result["first_rewards"] == [0.0, 0.0] and result["first_margin"] == 0.0
    assert first["reward_chosen"] == first["reward_rejected"] == first["margin"] == 0.0


def test_it_prefers_the_chosen_replies_in_the_predicted_steps(uninterrupted, sft_adapter):
    told, result, out = uninterrupted
    assert result["steps"] == pair_recipe().steps(5) == 4 != pair_recipe().steps_by_arithmetic(5)
    assert result["last_margin"] > 0 and result["last_loss"] < result["first_loss"]
    assert result["last_accuracy"] == told.rows[-1]["accuracy"] == 1.0
    wanted = {"loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "learning_rate", "grad_norm"}
    assert all(wanted <= set(row) for row in told.rows) and len(told.rows) == 4
    before, after = tensors(sft_adapter), tensors(out / "adapter")
    assert set(before) == set(after) and not any(torch.equal(before[name], after[name]) for name in before)
    assert adapters.base_of(settings.home(), out / "adapter") == adapters.base_of(settings.home(), sft_adapter)


def test_the_model_sees_exactly_what_the_template_rendered(tiny_llama, talk_dataset, sft_adapter, tmp_path):
    preferences = corpus.Dataset(talk_dataset, {}).preferences()
    template = ChatTemplate.load(tiny_llama)
    expected = template.pair(preferences[0])
    rows = training.Sequences([dpo.row(template.pair(preference)) for preference in preferences], [], 0)
    wanted = pair_recipe()
    loaded = model.load(
        tiny_llama,
        adapters.lora_of(sft_adapter),
        load_in_4bit=False,
        max_length=512,
        gradient_checkpointing=False,
        seed=1,
    )
    kept = training.checkpoints_of(wanted, rows, tmp_path, Quiet())
    made = dpo.trainer(loaded, tiny_llama, rows, wanted, kept, Quiet())
    batch = next(iter(made.get_train_dataloader()))
    assert len(batch["input_ids"]) == 4  # two pairs: their chosen replies, then their rejected ones
    replies = [expected.chosen] * 2 + [expected.rejected] * 2
    for row, ids in enumerate(replies):
        seen = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][seen].tolist() == expected.prompt + ids
        assert batch["completion_mask"][row][seen].tolist() == [0] * len(expected.prompt) + [1] * len(ids)
        assert ids[-1] == template.end_of_turn_id


def test_a_run_killed_with_sigkill_resumes_with_the_losses_of_an_uninterrupted_one(
    uninterrupted, sft_adapter, tiny_dataset, tmp_path
):
    code = (
        "import sys; from pathlib import Path; from given import Told; from test_dpo import pair_recipe\n"
        "from katherine import dpo\n"
        "adapter, data, out = map(Path, sys.argv[1:])\n"
        "dpo.train(data, adapter, pair_recipe(), out, Told(kill_at=3))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(sft_adapter), str(tiny_dataset), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = Told()
    result = dpo.train(tiny_dataset, sft_adapter, pair_recipe(), tmp_path, resumed)
    whole, expected, out = uninterrupted
    compared = ("loss", "margin", "reward_chosen", "reward_rejected")
    assert [[row[name] for name in compared] for row in resumed.rows] == [
        [row[name] for name in compared] for row in whole.rows[2:]
    ]
    assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    ours, theirs = tensors(tmp_path / "adapter"), tensors(out / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_published_qwen_form_is_trained_on_from_its_own_reference(tiny_qwen, tiny_dataset, tmp_path):
    everything = recipe.preset("all-linear", recipe.SftRecipe).target_modules
    first = tiny_recipe(tiny_qwen, target_modules=everything, num_train_epochs=1, per_device_batch_size=5)
    sft.train(tiny_dataset, first, tmp_path / "sft", Quiet())
    result = dpo.train(
        tiny_dataset,
        tmp_path / "sft" / "adapter",
        pair_recipe(num_train_epochs=2, per_device_batch_size=5),
        tmp_path / "dpo",
        Quiet(),
    )
    assert result["first_loss"] == pytest.approx(math.log(2), abs=2**-23) and result["first_rewards"] == [0.0, 0.0]
    assert result["steps"] == 2 and result["last_margin"] > 0


def test_held_out_pairs_are_evaluated(sft_adapter, tiny_dataset, tmp_path):
    told = Told()
    result = dpo.train(tiny_dataset, sft_adapter, pair_recipe(held_out=0.4, num_train_epochs=1), tmp_path, told)
    rows = [row for row in told.rows if "eval_loss" in row]
    assert result["held_out"] == 2 and len(rows) == 1
    assert rows[0]["eval_margin"] is not None and 0 <= rows[0]["eval_accuracy"] <= 1


def test_a_folder_that_is_no_adapter_is_named(tiny_llama, tiny_dataset, tmp_path):
    with pytest.raises(NotFound, match=r"has no base.json"):
        dpo.train(tiny_dataset, tiny_llama, pair_recipe(), tmp_path, Quiet())
