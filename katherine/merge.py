"""Base and adapter into one 16-bit checkpoint with the baked template, and how far it drifted from the two apart.
Loads the same transformers class that training did, so that the adapter's names fit. Needs torch: import it in a
job's process only."""

import gc
import json
import math
import shutil
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

    model = models.with_adapter(base, adapter, four_bit=as_trained)
    progress.step(1, 4)
    before = _log_probabilities(model, samples)
    if as_trained:
        del model
        _free()
        model = models.with_adapter(base, adapter)
    progress.step(2, 4)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(f"{adapter} cannot be merged: {error}. Its training went wrong; train again.") from error
    merged.to(torch.bfloat16)
    progress.step(3, 4)
    drift = _drift(before, _log_probabilities(merged, samples), tolerance, reason)
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


def _log_probabilities(model: Any, samples: list[Rendered]) -> Any:
    """float32 log-probabilities on the CPU, shape (tokens, vocabulary), at up to DRIFT_TOKENS learned positions."""
    import torch

    rows = []
    left = DRIFT_TOKENS
    for sample in samples:
        positions = [i for i, learned in enumerate(sample.learned) if learned and i][:left]
        if not positions:
            continue
        left -= len(positions)
        with torch.inference_mode():
            ids = torch.tensor([sample.ids], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            rows.append(torch.log_softmax(logits[[p - 1 for p in positions]].float(), dim=-1).cpu())
    return torch.cat(rows)


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
