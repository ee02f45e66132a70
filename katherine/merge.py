"""Base and adapter into one 16-bit checkpoint with the baked template, and how far it drifted from the two apart.
Loads the same transformers class that training did, so that the adapter's names fit. Needs torch: import it in a
job's process only."""

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katherine import model as models
from katherine.adapters import Base
from katherine.errors import ExportError
from katherine.progress import Progress
from katherine.template import ChatTemplate, Rendered

# Enough positions to tell a wrong merge from rounding; at a vocabulary of 248,320 each is 1 MB.
DRIFT_TOKENS = 256
# Padded tokens that go through the model at once: their logits are 2 GB at that vocabulary.
BATCH_TOKENS = 4096
# In nats a token. Measured on the small base, tuned: 0.0009 from rounding to bfloat16 alone, 0.008 to 0.04 with the
# adapter of one of its 30 layers left out, 1.15 without any of it. Ten times the first leaves room for the 16-bit
# arithmetic of a GPU.
ROUNDING = 0.01


@dataclass(frozen=True, slots=True)
class Drift:
    """Base plus adapter as trained, against the merged model, over learned tokens: mean KL divergence in nats a
    token, and the share of positions where both put the same token first."""

    kl: float
    top1: float
    tokens: int
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.kl) and self.kl <= self.tolerance


def merge(
    adapter: Path,
    base: Base,
    template: ChatTemplate,
    samples: list[Rendered],
    folder: Path,
    progress: Progress,
    *,
    max_kl: float,
) -> Drift:
    """Writes the merged checkpoint into `folder` and measures its drift on `samples`.

    `max_kl` is the tolerance where training saw a 4-bit base. Raises ModelError where the adapter does not fit,
    ExportError where it cannot be merged.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    as_trained = base.load_in_4bit and models.on_cuda()
    tolerance, reason = ROUNDING, f"only rounding to 16 bits may lie between them, and that stays below {ROUNDING}"
    if base.load_in_4bit:
        tolerance, reason = max_kl, "training saw a 4-bit base, and leaving that rounding behind costs what a quant may"
    if base.load_in_4bit and not as_trained:
        tolerance, reason = ROUNDING, f"measured on the 16-bit base, for want of a GPU; rounding stays below {ROUNDING}"

    model = models.with_adapter(base, adapter)
    progress.step(1, 4)
    # The base is loaded once: what 4 bits make of it is made a weight at a time, as each is used.
    with rounded(model, nf4) if as_trained else nullcontext():
        before = log_probabilities(model, samples)
    progress.step(2, 4)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(f"{adapter} cannot be merged: {error}. Its training went wrong; train again.") from error
    merged.to(torch.bfloat16)
    progress.step(3, 4)
    drift = _drift(before, log_probabilities(merged, samples), tolerance, reason)
    del before
    folder.mkdir(parents=True)
    # Published bases carry generation settings that transformers refuses to save; `bake` copies them as they are.
    merged.generation_config = transformers.GenerationConfig()
    # Shards that a machine with little memory can map one at a time.
    merged.save_pretrained(folder, max_shard_size="4GB")
    del model, merged
    _free()
    bake(Path(base.checkpoint), template, folder)
    progress.step(4, 4)
    return drift


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def nf4(weight: Any) -> Any:
    """A weight as a 4-bit base holds it: NF4 in blocks of 64 with the blocks' scales quantised too, as
    model.with_adapter loads one, and taken back to its own type. Needs bitsandbytes."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state)


@contextmanager
def rounded(model: Any, rounding: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, a PeftModel computes as if its base had been loaded in 4 bit: every linear weight that such a loading
    quantises goes through `rounding` while it is used, and is itself again afterwards. At most one is held twice.

    Which ones: transformers' own choice (replace_with_bnb_linear), which leaves out the head and whatever is tied.
    """
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    bare = model.get_base_model()
    # The adapter's layers stand where the base's linear ones were, and hold them under this name.
    names = {name.removesuffix(".base_layer"): module for name, module in bare.named_modules()}
    left_out = [name.removesuffix(".base_layer") for name in get_keys_to_not_convert(bare)]
    left_out += getattr(bare, "_keep_in_fp32_modules", None) or []
    held: dict[Any, Any] = {}

    def begin(module: Any, _: Any) -> None:
        held[module] = module.weight.data
        module.weight.data = rounding(module.weight.data)

    def end(module: Any, *_: Any) -> None:
        module.weight.data = held.pop(module)

    hooks = []
    for name, module in names.items():
        if type(module) is torch.nn.Linear and ".lora_" not in name and should_convert_module(name, left_out):
            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def log_probabilities(model: Any, samples: list[Rendered]) -> Any:
    """float32 log-probabilities on the CPU, shape (tokens, vocabulary), at up to DRIFT_TOKENS learned positions."""
    import torch

    wanted = []
    left = DRIFT_TOKENS
    for sample in samples:
        if positions := [i for i, learned in enumerate(sample.learned) if learned and i][:left]:
            wanted.append((sample.ids, positions))
            left -= len(positions)
    rows = []
    for batch in _batches(wanted):
        width = max(len(ids) for ids, _ in batch)
        # Filled up on the right, where a causal model's tokens cannot see it.
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, (_, positions) in zip(logits, batch, strict=True):
                rows.append(torch.log_softmax(row[[p - 1 for p in positions]].float(), dim=-1).cpu())
    return torch.cat(rows)


def _batches(wanted: list[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Samples that go through the model together, in their order: usually all of them."""
    batch: list[tuple[list[int], list[int]]] = []
    for each in wanted:
        if batch and (len(batch) + 1) * max(len(ids) for ids, _ in [*batch, each]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _drift(before: Any, after: Any, tolerance: float, reason: str) -> Drift:
    kl = (before.exp() * (before - after)).sum(dim=-1).mean().item()
    top1 = (before.argmax(dim=-1) == after.argmax(dim=-1)).float().mean().item()
    # Rounding can leave a sum of nothing a hair below zero; KL is never negative. NaN stays NaN.
    return Drift(0.0 if kl < 0 else kl, top1, len(before), tolerance, reason)


def bake(checkpoint: Path, template: ChatTemplate, folder: Path) -> None:
    """Puts the tokenizer beside the merged weights, with the baked template as the only one and the end-of-turn as
    the token that ends a reply, in every file that a program might read it from."""
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    tokenizer = _read_json(checkpoint / "tokenizer_config.json")
    tokenizer.pop("chat_template", None)
    _write_json(folder / "tokenizer_config.json", tokenizer | {"eos_token": template.end_of_turn})
    (folder / "chat_template.jinja").write_text(template.baked, encoding="utf-8")
    end = {"eos_token_id": template.end_of_turn_id}
    config = _read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= end
    _write_json(folder / "config.json", config | end)
    _write_json(folder / "generation_config.json", _read_json(checkpoint / "generation_config.json") | end)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
