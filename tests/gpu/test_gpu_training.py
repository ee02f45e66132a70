"""Training on an NVIDIA GPU, fitted and through unsloth, in 4 and in 16 bit: the tiny base in the published form goes
through SFT, a stop and a resume, DPO and the merge. Each stage runs in a process of its own, as a job does.

    python -m pytest tests/gpu

The first run compiles kernels, minutes of it; they are kept in KATHERINE_HOME/cache for the next."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from katherine import adapters, recipe, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PROJECT = Path(__file__).resolve().parents[2]
# Five examples, two a micro-batch, two of those a step: an epoch is 3 micro-batches and 2 steps, three make 6.
RECIPE = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 2}
STEPS = 6

STAGE = """
import json, sys
from pathlib import Path
from given import Told
from katherine import dpo, recipe, sft
from katherine.progress import Stopped

stage, values, arguments, stop_at, told_in = json.loads(sys.argv[1])
told = Told(stop_at=stop_at)
kind = recipe.SftRecipe if stage == "sft" else recipe.DpoRecipe
train = sft.train if stage == "sft" else dpo.train
*given, out = map(Path, arguments)
try:
    result = train(*given, recipe.make(kind, values), out, told)
except Stopped:
    result = None
Path(told_in).write_text(json.dumps({"result": result, "rows": told.rows, "lines": told.lines}))
"""
MERGE = """
import json, sys
from pathlib import Path
from katherine import adapters, corpus, merge, settings
from katherine.progress import Quiet
from katherine.template import ChatTemplate

adapter, dataset, folder, told_in = map(Path, sys.argv[1:])
record = adapters.base_of(settings.home(), adapter)
template = ChatTemplate.load(Path(record.checkpoint))
samples = [template.training(c) for c in corpus.Dataset(dataset, {}).conversations()]
# 0.25 nats: the recipe's own limit for what a quant may cost
drift = merge.merge(adapter, record, template, samples, folder, Quiet(), max_kl=0.25)
told_in.write_text(json.dumps({"kl": drift.kl, "passed": drift.passed}))
"""
ROUNDED = """
import json, sys
from pathlib import Path
from katherine import adapters, corpus, merge, model, settings
from katherine.template import ChatTemplate

adapter, dataset, told_in = map(Path, sys.argv[1:])
record = adapters.base_of(settings.home(), adapter)
template = ChatTemplate.load(Path(record.checkpoint))
samples = [template.training(c) for c in corpus.Dataset(dataset, {}).conversations()]
loaded = merge.log_probabilities(model.with_adapter(record, adapter, four_bit=True), samples)
once = model.with_adapter(record, adapter)
plain = merge.log_probabilities(once, samples)
with merge.rounded(once, merge.nf4):
    found = merge.log_probabilities(once, samples)
kl = [(loaded.exp() * (loaded - other)).sum(-1).mean().item() for other in (found, plain)]
told_in.write_text(json.dumps({"apart": kl[0], "unrounded": kl[1]}))
"""


def in_a_process(code: str, *arguments: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-8000:]


def stage(name: str, values: dict[str, Any], out: Path, *inputs: Path, stop_at: int = 0) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    told_in = out.parent / f"{out.name}-{stop_at}.json"
    in_a_process(STAGE, json.dumps([name, values, [*map(str, inputs), str(out)], stop_at, str(told_in)]))
    return json.loads(told_in.read_text())


class Trained:
    """The runs of one precision, fitted to the card or as written."""

    def __init__(self, base: Path, dataset: Path, folder: Path, load_in_4bit: bool, fit: bool):
        everything = recipe.preset("all-linear", recipe.SftRecipe).target_modules
        first = RECIPE | {
            "base": str(base),
            "load_in_4bit": load_in_4bit,
            "fit": fit,
            "lora_r": 16,
            "lora_alpha": 32,
            "learning_rate": 5e-3,
            "target_modules": list(everything),
        }
        self.dataset, self.folder, self.load_in_4bit, self.fit = dataset, folder, load_in_4bit, fit
        self.stopped = stage("sft", first, folder / "sft", dataset, stop_at=2)
        self.resumed = stage("sft", first, folder / "sft", dataset)
        self.adapter = folder / "sft" / "adapter"
        second = RECIPE | {"learning_rate": 1e-4, "warmup_ratio": 0.0, "fit": fit}
        self.dpo = stage("dpo", second, folder / "dpo", dataset, self.adapter)


WAYS = {"4bit": (True, True), "16bit": (False, True), "4bit-unsloth": (True, False), "16bit-unsloth": (False, False)}


@pytest.fixture(scope="module", params=WAYS)
def trained(request, tiny_qwen, tiny_dataset, tmp_path_factory) -> Trained:
    return Trained(tiny_qwen, tiny_dataset, tmp_path_factory.mktemp("gpu"), *WAYS[request.param])


def test_a_stopped_sft_run_goes_on_to_its_last_step_and_learns(trained):
    assert [row["step"] for row in trained.stopped["rows"]] == [1, 2] and trained.stopped["result"] is None
    assert [row["step"] for row in trained.resumed["rows"]] == [3, 4, 5, 6]
    assert any("Resuming from checkpoint-2" in line for line in trained.resumed["lines"])
    result = trained.resumed["result"]
    assert result["steps"] == STEPS and result["last_loss"] < result["first_loss"]
    # a fresh random model guesses evenly over the vocabulary's 49,408 rows
    assert result["first_loss"] == pytest.approx(math.log(49_408), rel=0.05)
    for row in trained.stopped["rows"] + trained.resumed["rows"]:
        assert row["tokens_per_second"] > 0 and row["memory_gib"] > 0 and math.isfinite(row["grad_norm"])


def test_a_fitted_training_is_captured_and_keeps_the_recipes_steps(trained):
    if not trained.fit:
        pytest.skip("trained as it is written")
    told = " ".join(trained.stopped["lines"])
    assert "captured as CUDA graphs" in told and "the loss that 2 × 2 would have" in told
    assert not any(line.startswith("Out of GPU memory") for line in trained.resumed["lines"])


def test_the_adapter_has_the_names_and_the_precision_it_has_from_a_cpu(trained):
    weights = load_file(trained.adapter / adapters.WEIGHTS)
    assert len(weights) == 2 * (3 * 8 + 7)  # 3 gated-delta layers of 8 linear modules, 1 attention layer of 7
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in weights)
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
    record = adapters.base_of(settings.home(), trained.adapter)
    assert record.model_class == "Qwen3_5ForConditionalGeneration" and record.dtype == "bfloat16"
    assert record.load_in_4bit is trained.load_in_4bit


def test_dpos_first_loss_is_ln_2_and_both_rewards_are_0(trained):
    result = trained.dpo["result"]
    # bfloat16 rounds ln 2 to 0.6914 where the head is bfloat16
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-6 if trained.fit else 2e-3)
    assert result["first_rewards"] == pytest.approx([0.0, 0.0], abs=0 if trained.fit else 1e-3)
    assert result["steps"] == STEPS and result["last_margin"] > 0
    before = load_file(trained.adapter / adapters.WEIGHTS)
    after = load_file(trained.folder / "dpo" / "adapter" / adapters.WEIGHTS)
    assert set(before) == set(after) and any(not torch.equal(before[name], after[name]) for name in before)


def test_the_adapter_merges_into_its_base(trained):
    merged, told_in = trained.folder / "merged", trained.folder / "merged.json"
    in_a_process(MERGE, str(trained.folder / "dpo" / "adapter"), str(trained.dataset), str(merged), str(told_in))
    assert json.loads(told_in.read_text())["passed"]
    assert (merged / "config.json").is_file() and any(merged.glob("*.safetensors"))


def test_a_base_rounded_as_it_is_used_computes_what_one_loaded_in_4_bit_does(trained):
    if not trained.load_in_4bit:
        pytest.skip("its base was not quantised")
    told_in = trained.folder / "rounded.json"
    in_a_process(ROUNDED, str(trained.folder / "dpo" / "adapter"), str(trained.dataset), str(told_in))
    found = json.loads(told_in.read_text())
    # On a CPU: 5e-6 nats a token between them, and 0.004 to the base as it is.
    assert found["apart"] < 1e-3 and found["apart"] < found["unrounded"] / 4


def test_compiled_kernels_are_kept_under_the_home(trained, katherine_home):
    kept = list((katherine_home.cache / "kernels").glob("*/*"))
    assert {path.name for path in kept} >= {"triton", "inductor"}
    assert any(path.is_file() for path in (katherine_home.cache / "kernels").rglob("*"))
