"""SFT on a CPU with the real trainer: what the model sees, what is learned, and that nothing is lost when a run is
stopped, killed or finds its newest checkpoint damaged."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from given import Told, reply, user, write_dataset
from safetensors.torch import load_file

from katherine import adapters, checkpoints, corpus, model, recipe, settings, sft, training
from katherine.errors import DataError, RecipeError, TemplateError, TrainingError
from katherine.examples import Conversation
from katherine.progress import Quiet, Stopped
from katherine.template import ChatTemplate, Parity

PROJECT = Path(__file__).resolve().parent.parent


def tiny_recipe(base: Path, **changes):
    """Five examples, two a micro-batch, two of those a step: an epoch is 3 micro-batches and 2 steps."""
    values = {
        "base": str(base),
        "lora_r": 4,
        "lora_alpha": 8,
        # so that a resumed run must find the random numbers where it left them
        "lora_dropout": 0.05,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "warmup_ratio": 0.0,
        "save_steps": 2,
        "learning_rate": 5e-3,
    }
    return recipe.preset("demo", recipe.SftRecipe, values | changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tiny_dataset, tmp_path_factory):
    """A run from start to end: its progress, result and folder."""
    told, out = Told(), tmp_path_factory.mktemp("uninterrupted")
    return told, sft.train(tiny_dataset, tiny_recipe(tiny_llama), out, told), out


def test_the_model_sees_exactly_what_the_template_rendered(tiny_llama, talk_dataset, tmp_path):
    conversations = corpus.Dataset(talk_dataset, {}).conversations()
    template = ChatTemplate.load(tiny_llama)
    expected = template.training(conversations[0])
    # a two-turn conversation: two learned spans, each ending with the end-of-turn
    assert len(expected.turns) == 2 and expected.ids[-1] == template.end_of_turn_id
    wanted = tiny_recipe(tiny_llama)
    rows = training.Sequences([sft.row(expected), sft.row(template.training(conversations[1]))], [], 0)
    kept = training.checkpoints_of(wanted, rows, tmp_path, Quiet())
    loaded = model.load(
        tiny_llama,
        adapters.Lora(4, 8, 0.0, wanted.target_modules),
        load_in_4bit=False,
        max_length=512,
        gradient_checkpointing=False,
        seed=1,
    )
    made = sft.trainer(loaded, tiny_llama, rows, wanted, kept, Quiet())
    batch = next(iter(made.get_train_dataloader()))
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        seen = mask.bool()
        assert ids[seen].tolist() == expected.ids
        learned = [i if on else -100 for i, on in zip(expected.ids, expected.learned, strict=True)]
        assert labels[seen].tolist() == learned
        assert (labels[~seen] == -100).all()


def test_it_makes_the_predicted_steps_and_logs_every_one(uninterrupted, tiny_llama):
    told, result, _ = uninterrupted
    predicted = tiny_recipe(tiny_llama).steps(5)
    assert predicted == 6 != tiny_recipe(tiny_llama).steps_by_arithmetic(5)
    assert result["steps"] == predicted and list(told.losses()) == list(range(1, predicted + 1))
    assert told.phases == ["load", "train", "save"] and told.steps[-1] == (predicted, predicted)
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "seconds"}
    for row in told.rows:
        assert wanted <= set(row) and row["tokens_per_second"] > 0 and row["memory_gib"] > 0
    assert result["first_loss"] == told.losses()[1] and result["last_loss"] == told.losses()[predicted]
    assert result["last_loss"] < result["first_loss"]
    assert result["examples"] == 5 and result["held_out"] == 0 and result["seconds"] > 0


def test_every_adapter_tensor_moves_and_the_vision_tower_gets_none(tiny_qwen, tiny_dataset, tmp_path):
    chosen = recipe.preset("all-linear", recipe.SftRecipe).target_modules
    wanted = tiny_recipe(tiny_qwen, target_modules=chosen, num_train_epochs=1, per_device_batch_size=5)
    result = sft.train(tiny_dataset, wanted, tmp_path, Quiet())
    assert result["steps"] == 1
    after = tensors(tmp_path / "adapter")
    assert len(after) == 2 * (3 * 8 + 7)  # 3 gated-delta layers of 8 linear modules, 1 attention layer of 7
    assert not [name for name in after if "visual" in name or "mtp" in name]
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in after)
    assert all(value.any() for name, value in after.items() if "lora_B" in name)
    record = adapters.base_of(settings.home(), tmp_path / "adapter")
    assert record == adapters.Base(
        str(tiny_qwen),
        str(tiny_qwen),
        "Qwen3_5ForConditionalGeneration",
        False,
        str(model.compute_type()).removeprefix("torch."),
    )
    assert adapters.lora_of(tmp_path / "adapter") == adapters.Lora(4, 8, 0.05, tuple(sorted(chosen)))


def test_a_stopped_run_keeps_its_work_and_goes_on_as_if_it_had_not(uninterrupted, tiny_llama, tiny_dataset, tmp_path):
    stopped = Told(stop_at=3)
    with pytest.raises(Stopped):
        sft.train(tiny_dataset, tiny_recipe(tiny_llama), tmp_path, stopped)
    assert list(stopped.losses()) == [1, 2, 3]
    assert not (tmp_path / "adapter").exists() and (tmp_path / "checkpoints" / "checkpoint-3").is_dir()
    resumed = Told()
    result = sft.train(tiny_dataset, tiny_recipe(tiny_llama), tmp_path, resumed)
    whole, expected, out = uninterrupted
    assert list(resumed.losses()) == [4, 5, 6]
    assert stopped.losses() | resumed.losses() == whole.losses()
    assert {k: result[k] for k in ("steps", "first_loss", "last_loss")} == {
        k: expected[k] for k in ("steps", "first_loss", "last_loss")
    }
    ours, theirs = tensors(tmp_path / "adapter"), tensors(out / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_with_sigkill_resumes_with_the_losses_of_an_uninterrupted_one(
    uninterrupted, tiny_llama, tiny_dataset, tmp_path
):
    code = (
        "import sys; from pathlib import Path; from given import Told; from test_sft import tiny_recipe\n"
        "from katherine import sft\n"
        "base, data, out = map(Path, sys.argv[1:])\n"
        "sft.train(data, tiny_recipe(base), out, Told(kill_at=4))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama), str(tiny_dataset), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = Told()
    result = sft.train(tiny_dataset, tiny_recipe(tiny_llama), tmp_path, resumed)
    whole, expected, out = uninterrupted
    # Step 4 was logged but not yet kept: it is made again, and logged again.
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 2}
    assert result["last_loss"] == expected["last_loss"]
    ours, theirs = tensors(tmp_path / "adapter"), tensors(out / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_newest_checkpoint_is_passed_over_and_another_recipe_is_refused(
    uninterrupted, tiny_llama, tiny_dataset, tmp_path
):
    whole, _, out = uninterrupted
    shutil.copytree(out / "checkpoints", tmp_path / "checkpoints")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(TrainingError, match="belongs to another recipe"):
        sft.train(tiny_dataset, tiny_recipe(tiny_llama, learning_rate=1e-3), tmp_path, Quiet())
    weights = tmp_path / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    resumed = Told()
    sft.train(tiny_dataset, tiny_recipe(tiny_llama), tmp_path, resumed)
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 4}
    assert any("checkpoint-6 is not sound (optimizer.pt" in line for line in resumed.lines)


def test_a_run_that_died_after_its_last_step_only_writes_the_adapter(uninterrupted, tiny_llama, tiny_dataset, tmp_path):
    _, expected, out = uninterrupted
    shutil.copytree(out / "checkpoints", tmp_path / "checkpoints")
    again = Told()
    assert sft.train(tiny_dataset, tiny_recipe(tiny_llama), tmp_path, again) == expected and again.rows == []
    ours, theirs = tensors(tmp_path / "adapter"), tensors(out / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_whose_writer_was_killed_is_absent(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from katherine import checkpoints; from katherine.progress import Quiet\n"
        "kept = checkpoints.Checkpoints(Path(sys.argv[1]), 2, 'same', Quiet())\n"
        "with kept.writing(1) as folder: (folder / 'a').write_text('whole')\n"
        "with kept.writing(2) as folder:\n"
        "    (folder / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT)
    assert child.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    kept = checkpoints.Checkpoints(tmp_path, 2, "same", Quiet())
    assert kept.newest() == tmp_path / "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_gradient_checkpointing_changes_the_memory_and_not_the_losses(
    uninterrupted, tiny_llama, tiny_dataset, tmp_path
):
    told = Told()
    sft.train(tiny_dataset, tiny_recipe(tiny_llama, gradient_checkpointing=True), tmp_path, told)
    whole, _, _ = uninterrupted
    # The same sums in another order.
    assert told.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_examples_longer_than_max_length_are_left_out_and_counted(tiny_llama, tmp_path):
    long = Conversation((user("Tell me everything."), reply("teal " * 40)))
    short = Conversation((user("Who are you?"), reply("Katherine.")))
    data = write_dataset(tmp_path / "data", [short, long, short], [])
    told = Told()
    wanted = tiny_recipe(tiny_llama, max_length=32, num_train_epochs=1)
    result = sft.train(data, wanted, tmp_path / "out", told)
    assert result["too_long"] == 1 and result["examples"] == 2 and result["steps"] == wanted.steps(2)
    assert any(line.startswith("1 of 3 examples are longer than max_length 32") for line in told.lines)
    with pytest.raises(DataError, match="No example is left"):
        sft.train(write_dataset(tmp_path / "only", [long], []), wanted, tmp_path / "none", Quiet())


def test_the_held_out_split_is_disjoint_the_same_in_any_order_and_evaluated(tiny_llama, tiny_dataset, tmp_path):
    wanted = tiny_recipe(tiny_llama, held_out=0.4, num_train_epochs=1)
    rows = [{"input_ids": [n], "labels": [n]} for n in range(50)]
    split = training.arrange(rows, len, wanted, Quiet())
    again = training.arrange(rows[::-1], len, wanted, Quiet())
    assert len(split.held_out) == 20 and not [row for row in split.held_out if row in split.train]
    assert sorted(map(str, split.held_out)) == sorted(map(str, again.held_out))
    other_seed = tiny_recipe(tiny_llama, held_out=0.4, seed=7)
    assert split.held_out != training.arrange(rows, len, other_seed, Quiet()).held_out
    told = Told()
    result = sft.train(tiny_dataset, wanted, tmp_path, told)
    evaluated = [row["eval_loss"] for row in told.rows if "eval_loss" in row]
    assert len(evaluated) == 1 and result["last_eval_loss"] == evaluated[0]
    assert result["held_out"] == 2 and result["examples"] == 3 and result["steps"] == wanted.steps(5)


def test_averaging_takes_the_mean_of_the_last_checkpoints(tiny_llama, tiny_dataset, tmp_path):
    wanted = tiny_recipe(tiny_llama, average_checkpoints=3, save_steps=1, num_train_epochs=2)
    sft.train(tiny_dataset, wanted, tmp_path, Quiet())
    kept = [tensors(tmp_path / "checkpoints" / f"checkpoint-{step}") for step in (2, 3, 4)]
    for name, value in tensors(tmp_path / "adapter").items():
        assert torch.allclose(value, sum(state[name] for state in kept) / 3, atol=1e-7)


def test_the_moving_average_follows_its_formula_and_survives_a_stop(tiny_llama, tiny_dataset, tmp_path):
    wanted = tiny_recipe(tiny_llama, ema_decay=0.9, save_steps=1, num_train_epochs=1)
    with pytest.raises(Stopped):
        sft.train(tiny_dataset, wanted, tmp_path, Told(stop_at=1))
    sft.train(tiny_dataset, wanted, tmp_path, Quiet())
    first, second = (tensors(tmp_path / "checkpoints" / f"checkpoint-{step}") for step in (1, 2))
    for name, value in tensors(tmp_path / "adapter").items():
        if "lora_B" in name:  # starts at zero
            average = first[name] * (1 - 2 / 11)
            assert torch.allclose(value, average * 3 / 12 + second[name] * 9 / 12, atol=1e-7)
            assert not torch.equal(value, second[name])


def test_what_cannot_work_is_refused_in_words(tiny_llama, tiny_dataset, tmp_path):
    with pytest.raises(RecipeError, match="turn load_in_4bit off"):
        sft.train(tiny_dataset, tiny_recipe(tiny_llama, load_in_4bit=True), tmp_path, Quiet())
    with pytest.raises(RecipeError, match="qkv_proj, which LlamaForCausalLM does not have"):
        sft.train(tiny_dataset, tiny_recipe(tiny_llama, target_modules=("q_proj", "qkv_proj")), tmp_path, Quiet())
    with pytest.raises(TemplateError, match=r"first: example 1"):
        training.proven(Parity(1, 1, 0, "", ["example 1, turn 2: token 3 differs"]), (), Quiet())


def test_the_log_says_what_the_base_would_have_added_and_who_reads_otherwise(tiny_qwen, talk_dataset, tmp_path):
    told = Told()
    sft.train(talk_dataset, tiny_recipe(tiny_qwen, num_train_epochs=1), tmp_path, told)
    assert any("every reply opens as the inference prompt ends" in line for line in told.lines)
    assert "Training and chat see the same tokens: 4 replies in 2 examples." in told.lines
    # This tokenizer joins the two newlines before a reply where the prompt ends, and not where words follow them.
    assert any(line.startswith("2 of their prompts are other tokens to a program that reads") for line in told.lines)
    assert any("get no LoRA on their attention" in line for line in told.lines)


def test_eight_bit_adamw_is_replaced_on_a_cpu_and_said(tiny_llama, tmp_path):
    told = Told()
    wanted = tiny_recipe(tiny_llama, optim="adamw_8bit")
    assert training.arguments(wanted, tmp_path, 0, told)["optim"] == "adamw_torch"
    assert told.lines == ["optim is adamw_torch here: adamw_8bit needs CUDA."]


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_setting_to_lower(tiny_llama, tiny_dataset, tmp_path):
    from transformers import LlamaForCausalLM

    broken = shutil.copytree(tiny_llama, tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(broken)
    base.model.norm.weight.data.fill_(float("nan"))
    base.save_pretrained(broken)
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        sft.train(tiny_dataset, tiny_recipe(broken), tmp_path / "out", Quiet())
