"""How a training is laid out on this machine: how many tokens are looked at at once, how much of the forward pass is
kept, and whether it is captured as CUDA graphs. Never what is trained: the examples of a step, their number and the
loss are the recipe's. Imports nothing of torch: the panel asks too."""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from katherine import gpu, settings, shapes
from katherine.adapters import Lora
from katherine.errors import SetupError
from katherine.gpu import GpuReading
from katherine.progress import Progress
from katherine.recipe import DpoRecipe, SftRecipe
from katherine.settings import Home
from katherine.shapes import Shape

# transformers' classes whose packed reading is proven equal to their own, by tests.
PACKED = ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")

# Bytes that a layer keeps of a token for the backward pass, per unit of its width and of its MLP's: norms, residuals,
# projections and their low ranks; gate, up, product and its dropout. Measured: 37.6 GiB at most with 4,608 tokens of
# the 9B's shape in 4 bit, of which 8.7 are weights and optimiser and 3 the head: 184 kB a token and layer.
KEPT_BY_WIDTH, KEPT_BY_MLP = 24, 7
# The head's float32 logits, their copy in the narrow type and their exponentials, per number.
HEAD_BYTES = 12
# Graphs of several sizes share a pool that breaks up into pieces: 71.4 GiB were reserved where 37.6 were in use.
CAPTURE_FACTOR = 2.1
# What CUDA itself, the allocator's rounding and the vision tower (0.9 GiB) take.
BESIDE = 2.0 * 2**30
# What NCCL keeps for the sums of several processes; a guess, never measured.
NCCL = 1.0 * 2**30
# Fewer tokens than this at once leave a large GPU idle between kernels; with fewer, recomputing is the better way out.
ENOUGH = 2048
LEAST = 256
CPU_TOKENS = 2048
# Tokens of a sequence that fla's kernels take together.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Multiples:
    """What the sizes of a batch are rounded up to, so that captured graphs and tuned kernels meet few different ones:
    tokens, rows, places of a row, and chunks of CHUNK tokens."""

    tokens: int = 1
    rows: int = 1
    width: int = 1
    chunks: int = 1


# Without graphs a new size costs nothing but what is rounded up.
_LOOSE = Multiples(tokens=64, width=64, chunks=8)


@dataclass(frozen=True, slots=True)
class Fit:
    """tokens: the most of one batch. recomputed: layers whose forward pass is done again in the backward pass instead
    of being kept. captured: as CUDA graphs. logits: numbers of the head held at a time. multiples: what batch sizes are
    rounded up to. lines: what a person is told."""

    tokens: int
    recomputed: int
    captured: bool
    logits: int
    multiples: Multiples
    lines: tuple[str, ...] = ()


def wanted(recipe: SftRecipe | DpoRecipe, checkpoint: Path, card: GpuReading | None, progress: Progress) -> bool:
    """Whether a training is fitted; says why not, where it was asked for. `checkpoint`: the base's folder."""
    if not recipe.fit:
        return False
    reason = obstacle(json.loads((checkpoint / "config.json").read_bytes()), card)
    if reason:
        progress.say(f"Not fitted to this machine, but trained as the recipe is written: {reason}.")
    return not reason


def obstacle(config: Mapping[str, Any], card: GpuReading | None) -> str:
    """Why a base with that config.json cannot be fitted here and is trained as its recipe is written, as a clause; ""
    where it can."""
    kind = (config.get("architectures") or ["none"])[0]
    if kind not in PACKED:
        return f"{kind} was never proven to read packed batches"
    text = config.get("text_config") or config
    if text.get("use_sliding_window"):
        return "its attention looks back through a window"
    if card is None:
        return ""
    if float(card.compute_capability) < 8:
        return f"the {card.name} has no arithmetic for bfloat16"
    if "linear_attention" in (text.get("layer_types") or []) and importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    return ""


def obstacle_of(home: Home, base: str) -> str:
    """As obstacle, for a base by name on this machine, before anything is fetched."""
    config = shapes.config(home, base)
    if config is None:
        return f"nothing is known of {base} before it is fetched"
    try:
        return obstacle(config, gpu.mine())
    except SetupError as unwell:
        return str(unwell)


def lay_out(
    recipe: SftRecipe | DpoRecipe,
    checkpoint: Path,
    card: GpuReading | None,
    units: Sequence[int],
    lora: Lora,
    four_bit: bool,
    progress: Progress,
    processes: int = 1,
) -> Fit:
    """As choose, for the base in `checkpoint`, and said."""
    found = choose(recipe, shapes.of(settings.home(), str(checkpoint)), card, units, lora, four_bit, processes)
    for line in found.lines:
        progress.say(line)
    return found


def choose(
    recipe: SftRecipe | DpoRecipe,
    shape: Shape | None,
    card: GpuReading | None,
    units: Sequence[int],
    lora: Lora,
    four_bit: bool,
    processes: int = 1,
) -> Fit:
    """units: tokens of each example, or of both rows of each pair. card: the GPU, None without one. processes: those
    that share each step, with a card of this kind each."""
    longest = max(units)
    whole = step_tokens(units, recipe.effective_batch_size)
    rows = recipe.effective_batch_size * (2 if isinstance(recipe, DpoRecipe) else 1)
    if processes > 1:
        # Shares differ by one unit at the most, in tokens; in rows they may differ by more.
        whole, rows = min(whole, math.ceil(whole / processes) + longest), 8
    if card is None or shape is None or card.memory_total is None:
        layers = shape.layers if shape else 0
        return Fit(
            max(CPU_TOKENS, longest),
            layers if recipe.gradient_checkpointing else 0,
            False,
            1 << 26,
            Multiples(),
            (
                f"Laid out for this machine: up to {max(CPU_TOKENS, longest):,} tokens at once, without padding"
                f"{f', in each of {processes} processes' if processes > 1 else ''}.",
            ),
        )
    logits = head_logits(card.memory_total)
    free = card.memory_total - (card.memory_used or 0)
    # The gradients end to end and their sum, beside a captured graph's own.
    summed = NCCL + shape.adapter(lora.r, lora.target_modules) * shapes.GRADIENT
    beside = BESIDE + (summed if processes > 1 else 0)
    room = free - beside - static_bytes(recipe, shape, lora, four_bit) - logits * HEAD_BYTES
    tokens, recomputed, captured = layout(room, shape, whole, longest)
    coarse = 512 if whole >= 2048 else 128
    multiples = Multiples(coarse, rows, 64, 32) if captured else _LOOSE
    found = Fit(tokens, recomputed, captured, logits, multiples)
    return replace(found, lines=_told(found, recipe, shape, card, whole, processes))


def layout(room: float, shape: Shape, whole: int, longest: int) -> tuple[int, int, bool]:
    """(tokens, recomputed, captured) for that many bytes: everything at once and kept, if possible captured; else
    fewer tokens at once, as long as there are enough of them; else the same with layers recomputed."""
    layer = layer_bytes(shape)
    if whole * layer * shape.layers * CAPTURE_FACTOR <= room:
        return whole, 0, True
    parts = max(1, math.floor(whole / ENOUGH))
    for count in range(1, parts + 1):
        tokens = max(math.ceil(whole / count), longest)
        if tokens * layer * shape.layers <= room:
            return tokens, 0, False
    tokens = max(math.ceil(whole / parts), longest)
    while True:
        recomputed = _recomputed(room, tokens, shape)
        if recomputed is not None:
            return tokens, recomputed, False
        if tokens <= max(LEAST, longest):
            return tokens, shape.layers, False
        tokens = max(LEAST, longest, tokens // 2)


def _recomputed(room: float, tokens: int, shape: Shape) -> int | None:
    """The fewest layers to recompute so that `tokens` fit in `room` bytes; None where not even all are enough. A
    recomputed layer keeps its input, and one at a time is there in full."""
    layer, kept = layer_bytes(shape), 2 * shape.width
    for count in range(1, shape.layers + 1):
        if tokens * (layer * (shape.layers - count + 1) + kept * count) <= room:
            return count
    return None


def layer_bytes(shape: Shape) -> float:
    """That a layer keeps of one token."""
    mlp = shape.linears["up_proj"].outputs
    return KEPT_BY_WIDTH * shape.width + KEPT_BY_MLP * mlp


def static_bytes(recipe: SftRecipe | DpoRecipe, shape: Shape, lora: Lora, four_bit: bool) -> float:
    """Weights, adapter, gradients and optimiser, whatever the batch."""
    linear = shape.parameters - shape.embeddings
    weights = shape.embeddings * 2 + linear * (shapes.NF4_BYTES if four_bit else 2)
    # NF4 is widened for each product, one weight at a time.
    weights += max(each.inputs * each.outputs for each in shape.linears.values()) * 2 if four_bit else 0
    each = shapes.WEIGHT + shapes.GRADIENT * 2 + shapes.MOMENTS[recipe.optim]
    # DPO's reference, and the policy's weights while the reference is asked.
    each += shapes.WEIGHT * (2 * isinstance(recipe, DpoRecipe) + bool(recipe.ema_decay))
    return weights + shape.adapter(lora.r, lora.target_modules) * each


def head_logits(memory: int) -> int:
    """Numbers of the head to hold at a time: more are a little faster."""
    gib = memory / 2**30
    return 1 << (28 if gib > 60 else 27 if gib > 30 else 26 if gib > 20 else 25)


def step_tokens(units: Sequence[int], batch: int) -> int:
    """Tokens of nearly every step of `batch` units: the mean, and four standard deviations of the sum. The rare step
    that has more is looked at in two parts."""
    mean = sum(units) / len(units)
    variance = sum((each - mean) ** 2 for each in units) / len(units)
    most = mean * batch + 4 * math.sqrt(variance * batch)
    return math.ceil(max(min(most, sum(sorted(units)[-batch:])), max(units)))


def tighter(fit: Fit, layers: int) -> Fit | None:
    """The next smaller layout, for when memory ran out after all; None where there is none."""
    if fit.captured:
        return replace(fit, captured=False, multiples=_LOOSE)
    if fit.recomputed < layers:
        return replace(fit, recomputed=layers)
    if fit.tokens > LEAST:
        return replace(fit, tokens=max(LEAST, fit.tokens // 2), logits=max(1 << 24, fit.logits // 2))
    return None


def _told(
    fit: Fit, recipe: SftRecipe | DpoRecipe, shape: Shape, card: GpuReading, whole: int, processes: int
) -> tuple[str, ...]:
    examples = f"the {recipe.effective_batch_size} {'pairs' if isinstance(recipe, DpoRecipe) else 'examples'}"
    shared = f", which {processes} GPUs share," if processes > 1 else ""
    count = math.ceil(whole / fit.tokens)
    once = f"{examples} of a step{shared} at once" if count == 1 else f"a step{shared} in {count} parts"
    kept = "nothing recomputed" if not fit.recomputed else f"{fit.recomputed} of {shape.layers} layers recomputed"
    captured = ", captured as CUDA graphs" if fit.captured else ""
    return (
        f"Fitted to the {card.name}: {once}, up to {fit.tokens:,} tokens without padding, {kept}{captured}.",
        f"Each step has {examples} and the loss that {recipe.per_device_batch_size} × "
        f"{recipe.gradient_accumulation_steps} would have.",
    )
