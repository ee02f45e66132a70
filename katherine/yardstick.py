"""Measured figures, and the arithmetic that moves them to other sizes, batches and cards: seconds of a micro-batch and
before the first step, GPU memory, the parts of an export. What a whole pipeline takes, and what finished runs correct,
is estimate's business."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from katherine import fit
from katherine.adapters import Lora
from katherine.hardware import SHEETS
from katherine.recipe import DpoRecipe, ExportRecipe, Recipe, SftRecipe
from katherine.shapes import GRADIENT, MOMENTS, NF4_BYTES, WEIGHT, Shape

GIB = 2**30

# --------------------------------------------------------------------------------------------- measured figures
# One H200 SXM with 16 cores, the 9B's shape, the recipe's lengths, through unsloth. Seconds are (usual, low, high).
NINE_B = 8_953_803_264
NINE_B_LAYERS = 32
_H200 = "measured on one H200 at the 9B's shape"
# Loading: 46 s through unsloth, 17 to 23 s through plain transformers. A slow volume may take twice as long.
_LOAD = (46.0, 17.0, 92.0)
# Until the first step is made: 134 and 163 s with nothing compiled, about three minutes in jobs of ours; 46 s and less
# where another run has left its kernels. DPO, which finds some of SFT's: 62 s.
_FIRST = {"sft": (134.0, 46.0, 180.0), "dpo": (62.0, 46.0, 163.0)}
# The same of a fitted training: 24 to 30 s from the start to the first step, 42 where the libraries came from a cold
# disk. The first step: 45 and 70 s on machines that had compiled nothing, five with an earlier run's kernels. DPO finds
# SFT's.
_LOAD_FITTED = (27.0, 20.0, 92.0)
_FIRST_FITTED = {"sft": (60.0, 5.0, 90.0), "dpo": (12.0, 5.0, 60.0)}
# On a card that katherine/kernels has no launches for, fla tunes them: four to six minutes.
_FIRST_TUNED = {"sft": (250.0, 15.0, 350.0), "dpo": (60.0, 8.0, 250.0)}
_HOPPER = ("H100", "H200")
# A micro-batch, whether of 16 or of 32 rows: the GPU waits for launches, not for arithmetic. SFT: 0.61 s (1.22 a step
# of two), 0.52 and 0.60 (32 rows at once), 0.83 in jobs of ours (1.66 a step). DPO: 1.18 (2.35 a step of two) and 1.3.
_LAUNCH = {"sft": (0.72, 0.52, 0.83), "dpo": (1.24, 1.18, 1.30)}
# Without checkpointing, with fla in unsloth's place: 0.44 (0.88 a step of two) and 0.56 (32 rows at once).
_LAUNCH_UNCHECKED = (0.50, 0.44, 0.83)
# Share of the data sheet's FLOP/s that large matrix products reach: 790 of 989 TFLOP/s was measured; half of that is
# what training with adapters and dequantising may be left with.
_REACHED = (0.6, 0.8, 0.4)
# FLOPs by token and weight with frozen weights: 2 forward, 2 backward, 2 to do the forward again with checkpointing.
_FORWARD, _BACKWARD = 2, 2
# An export's parts that stand alone, and the name of what follows them, where several are at work at once.
ALONE = ("merge", "convert", "measure")
TOGETHER = "quantise and check"
# 44 to 54 s to memory with a 4-bit base: 21 to import and load, 25 to measure the drift and write the checkpoint. About
# two minutes from a cold disk.
_MERGE = (50.0, 27.0, 120.0)
# To a 17.9 GB GGUF: 83 and 95 s by the converter as it is; made quicker and to memory 24, of which 13 are its start and
# the vocabulary.
_CONVERT = (24.0, 15.0, 95.0)
_MEASURE = (1.5, 1.0, 10.0)  # three types, a dry run each, at once
# Alone on 16 cores; each within 3 s, twice.
_QUANTISE = {"q4_k_m": 64.0, "q5_k_m": 53.0, "q6_k": 35.0}
# Several at once keep all cores at work, and there is little that one alone would leave idle: of three on 16 cores,
# beside their checks on the card, the first was done after 104 s and 85% of the others after 134.
_OVERLAPPED = (0.98, 0.72, 1.1)
_EXPORT_CORES = 16
# A K-quant of 4 to 6 bits made by torch on the card: of three at once the first was done after 32 and 38 s, the last
# after 46 and 56.
_QUANTISE_ON_CARD = (19.0, 10.0, 38.0)
_MADE_ON_CARD = ("q4_k", "q5_k", "q6_k")
# A check of 256 generated tokens and some 460 read ones: 36 s for each of the three quants, 72 s for the 16-bit file,
# on the processor. A token that is read counts as a tenth of one that is generated.
_CHECKED = {"quant": 36.0 / (256 + 46), "bf16": 72.0 / (256 + 46)}
# Where llama.cpp is built for the card: 16 to 27 s for the 16-bit file, loading included, and 7 to 13 for a quant, of
# 24 examples with 16 tokens generated.
_CHECKED_ON_CARD = 0.11
# Tokens of a usual reply in the recipe's corpus, and of an example as a whole.
_REPLY, _EXAMPLE = 40, 100

# Share of the data sheet's FLOP/s that captured steps reached: 0.324 s in 16 bit at 3,684 tokens, 41%; 0.326 and 0.341
# in 4 bit; 33% in a job whose steps of 2,441 tokens were rounded up to 2,560 and 3,072.
_REACHED_FITTED = (0.39, 0.45, 0.28)
# Seconds that the processor takes to launch a batch's kernels: by replaying; one by one (0.41 in 16 bit, 0.61 in 4);
# one by one and again (0.95 to 1.2). What DPO makes of pairs is half as much again.
_LAUNCH_FITTED = {"captured": (0.12, 0.08, 0.25), "kept": (0.55, 0.41, 0.8), "recomputed": (1.05, 0.9, 1.5)}
# Of a step that two GPUs share, a half took 1.44 and 1.53 times as long as half of one's step (0.244 of 0.339 s, 0.266
# of 0.348): what each does alone, whatever its share. With the launches, reckoned beside, a step comes out in between.
# More than two were never timed.
_UNSHARED = 0.44
# GiB of a micro-batch's activations by padded token: what 16 rows more cost (10.2 - 9.6 to 10.6 - 9.6 GiB, 3,200
# tokens), and without checkpointing 57.5 - 9.6 GiB at 16 rows, 107.9 - 10.6 at 32.
_KEPT_CHECKPOINTED = 0.25 / 1024
_KEPT = 15.0 / 1024
# The allocator reserves that much beyond what the parts add up to (9.6 GiB measured, 9.3 added up; 10.8 in our jobs).
_RESERVED = 0.6
_MEMORY_RANGE = 0.15
# The demo on two cores: SmolLM2-135M, the sample persona.
_DEMO = "measured on two cores with the small base"
SMALL = 134_479_872
# FLOPs a second and core that the demo's 90 steps of SFT (138 s in all) and 16 of DPO (37 s) come to, at their padded
# tokens: of a pair, many are a prompt that both rows share, so that less is done than reckoned.
_CPU_FLOPS = {"sft": 5.7e10, "dpo": 1.1e11}
# Cores differ by this much either way.
_CPU_RANGE = 2.0
_CPU_SETUP = (11.0, 8.0, 40.0)
_CPU_MEMORY = (3.2, 2.1, 4.0)
_CPU_CORES = 2
_CPU_EXPORT = 38.0
_CPU_PROBE = 62.0 / 6  # base, SFT, DPO and three files
# A base ten times the measured one is as far as a CPU's figures are carried.
CPU_LARGEST = 10 * SMALL

# Token lengths of the corpus that the recipe was derived on: for a dataset whose tokens were not counted.
_K0_LENGTHS = {"p50": 102, "p90": 192, "p99": 246, "max": 280}


@dataclass(frozen=True, slots=True)
class Figure:
    """A quantity with its honest range, and what it rests on."""

    value: float
    low: float
    high: float
    basis: str = ""

    def __add__(self, other: "Figure") -> "Figure":
        basis = "; ".join(dict.fromkeys(part for part in (self.basis, other.basis) if part))
        return Figure(self.value + other.value, self.low + other.low, self.high + other.high, basis)

    def times(self, factor: float) -> "Figure":
        return Figure(self.value * factor, self.low * factor, self.high * factor, self.basis)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a dataset: what its report counted, None where there is no dataset yet."""

    report: dict[str, Any] | None

    def examples(self, made: SftRecipe | DpoRecipe) -> int | None:
        return None if self.report is None else examples(self.report, made)

    def lengths(self, kind: str) -> tuple[dict[str, Any], bool]:
        """Percentiles, and whether they are the dataset's own."""
        tokens = (self.report or {}).get("tokens") or {}
        found = (tokens.get("pairs") if kind == "dpo" else tokens) or {}
        if all(isinstance(found.get(name), int) for name in _K0_LENGTHS):
            return found, True
        return _K0_LENGTHS, False


def examples(report: dict[str, Any], made: SftRecipe | DpoRecipe) -> int:
    """How many examples of a dataset training will use, without those counted as too long, where they were counted by
    its limit. `report` is the dataset's."""
    counts = report["tokens"] or {"max_length": None}
    if isinstance(made, DpoRecipe):
        counts = counts | (counts.get("pairs") or {})
    too_long = counts["over_max_length"] if counts["max_length"] == made.max_length else 0
    return (report["sft"]["unique"] if isinstance(made, SftRecipe) else report["dpo"]["used"]) - too_long


def batches_a_step(each: SftRecipe | DpoRecipe) -> int:
    """A fitted training is given whole steps."""
    return 1 if each.fit else each.gradient_accumulation_steps


def batches(each: SftRecipe | DpoRecipe, examples: int) -> int:
    """Of the whole training."""
    if each.fit:
        return each.steps(examples)
    return math.ceil(each.trained_on(examples) / each.per_device_batch_size) * each.num_train_epochs


def batch_tokens(counts: Counts, each: SftRecipe | DpoRecipe) -> float:
    """Tokens of a batch: of a whole step without padding where it is fitted, else its rows, each as long as the longest
    of them is to be expected."""
    pair = 2 if isinstance(each, DpoRecipe) else 1
    lengths, _ = counts.lengths(each.kind)
    if each.fit:
        mean = statistics.mean(min(_quantile(lengths, (i + 0.5) / 100), each.max_length) for i in range(100))
        return each.effective_batch_size * pair * mean
    rows = each.per_device_batch_size * pair
    return rows * min(_quantile(lengths, rows / (rows + 1)), each.max_length)


def _quantile(lengths: Mapping[str, Any], share: float) -> float:
    """Between the percentiles that are known, in a straight line; half the median at the least."""
    known = [(0.0, lengths["p50"] / 2), (0.5, lengths["p50"]), (0.9, lengths["p90"]), (0.99, lengths["p99"])]
    known.append((1.0, lengths["max"]))
    for (a, low), (b, high) in pairwise(known):
        if share <= b:
            return low + (high - low) * (share - a) / (b - a)
    return lengths["max"]


def batch(
    gpu: str,
    cores: int | None,
    card: float | None,
    made: Mapping[str, Recipe],
    each: SftRecipe | DpoRecipe,
    counts: Counts,
    shape: Shape | None,
    gpus: int = 1,
) -> Figure | None:
    """Seconds of one batch, by measured launches and the arithmetic it cannot be faster than; None for a card without a
    data sheet here, and for a large base without a card. card: its memory in bytes, which a fitted training is laid out
    by; gpus: how many of them share its steps."""
    if shape is None:
        return None
    sft = made.get("sft")
    if gpu and card and each.fit and isinstance(sft, SftRecipe):
        return _fitted(gpu, card, each, sft, counts, shape, gpus)[0]
    tokens = batch_tokens(counts, each)
    dpo = isinstance(each, DpoRecipe)
    # DPO's reference goes forward once more.
    work = _FORWARD * (2 if dpo or each.gradient_checkpointing else 1) + _BACKWARD
    if dpo and each.gradient_checkpointing:
        work += _FORWARD
    flops = work * shape.parameters * tokens
    if not gpu:
        if shape.parameters > CPU_LARGEST or not cores:
            return None
        value = flops / (_CPU_FLOPS[each.kind] * cores)
        return Figure(value, value / _CPU_RANGE, value * _CPU_RANGE, _DEMO)
    sheet = SHEETS.get(gpu)
    if sheet is None:
        return None
    launch = _LAUNCH[each.kind] if each.gradient_checkpointing or dpo else _LAUNCH_UNCHECKED
    layers = shape.layers / NINE_B_LAYERS
    # Every pass reads all weights; in 4 bit they are also written out in 16, and read again.
    four_bit = isinstance(sft, SftRecipe) and sft.load_in_4bit
    traffic = shape.parameters * ((NF4_BYTES + 4) if four_bit else 2) * (work / 2) / sheet.bandwidth
    arithmetic = [flops / (sheet.peak * reached) + traffic for reached in _REACHED]
    seconds = [max(a * layers, b) for a, b in zip(launch, arithmetic, strict=True)]
    basis = _H200
    if seconds[0] > launch[0] * layers:
        basis = f"arithmetic from NVIDIA's data sheet for {gpu}"
    elif gpu != "H200 SXM":
        # Launches are the processor's work, and this card's host was never timed.
        seconds[1] *= 0.8
        seconds[2] *= 1.5
        basis = f"{_H200}, where steps wait for launches and not for the card"
    return _of(seconds, basis)


def before_first_step(gpu: str, each: SftRecipe | DpoRecipe, shape: Shape | None, compiled: bool) -> dict[str, Figure]:
    """Seconds of what comes before the steps, by part; empty where nothing is known. compiled: kernels of an earlier
    run are at hand."""
    if shape is None:
        return {}
    if not gpu:
        if shape.parameters > CPU_LARGEST:
            return {}
        return {"load and first step": _of(_CPU_SETUP, _DEMO)}
    if gpu not in SHEETS:
        return {}
    size = shape.parameters / NINE_B
    fitted = _FIRST_FITTED if gpu.startswith(_HOPPER) else _FIRST_TUNED
    value, low, high = (fitted if each.fit else _FIRST)[each.kind]
    if compiled:
        value, high = low, value
    return {
        # No base loads at once: libraries are imported and the tokens counted first.
        "load": _of([max(seconds * size, 5.0) for seconds in (_LOAD_FITTED if each.fit else _LOAD)], _H200),
        "first step": Figure(value, min(low, value), high, _H200),
    }


def _fitted(
    gpu: str, memory: float, each: SftRecipe | DpoRecipe, sft: SftRecipe, counts: Counts, shape: Shape, gpus: int = 1
) -> tuple[Figure | None, Figure]:
    """Seconds of a step that is fitted to a kind of GPU, and its GiB at the most. memory: the card's, in bytes. The
    seconds are None for a card without a data sheet here."""
    lora = Lora(sft.lora_r, sft.lora_alpha, sft.lora_dropout, sft.target_modules)
    dpo = isinstance(each, DpoRecipe)
    # A GPU's share.
    whole = batch_tokens(counts, each) / gpus
    longest = min(counts.lengths(each.kind)[0]["max"], each.max_length) * (1 + dpo)
    fixed = fit.static_bytes(each, shape, lora, sft.load_in_4bit) + fit.head_logits(int(memory)) * fit.HEAD_BYTES
    tokens, recomputed, captured = fit.layout(memory - fit.BESIDE - fixed, shape, math.ceil(whole), longest)
    once = min(tokens, whole)
    kept = once * fit.layer_bytes(shape) * (shape.layers - recomputed + bool(recomputed))
    kept += once * 2 * shape.width * recomputed
    gib = (fixed + kept) / 2**30
    # What is reserved in pieces counts as used to whoever looks from outside.
    most = gib * (fit.CAPTURE_FACTOR if captured else 1.2) + 1
    # Short of it, the allocator gives back what lies idle, and the layout shrinks: it is laid out by this very memory.
    most = min(most, max(memory / 2**30, gib))
    said = f"weights, adapter, optimiser and head {fixed / 2**30:.1f}, batch {kept / 2**30:.1f} GiB; {_H200}"
    takes = Figure(gib, gib * 0.85, most, said)
    sheet = SHEETS.get(gpu)
    if sheet is None:
        return None, takes
    # DPO's reference goes forward once more.
    work = 2 * (1 + dpo) + 2 + 2 * recomputed / shape.layers
    traffic = shape.parameters * ((NF4_BYTES + 4) if sft.load_in_4bit else 2) * (work / 2) / sheet.bandwidth
    parts = math.ceil(whole / tokens)
    launches = _LAUNCH_FITTED["captured" if captured else "recomputed" if recomputed else "kept"]
    layers = shape.layers / NINE_B_LAYERS * (1 + dpo / 2) * parts
    # Launches are every GPU's own already.
    beside = 1 + _UNSHARED * (gpus - 1)
    arithmetic = [
        (work * shape.parameters * whole / (sheet.peak * reached) + traffic * parts) * beside
        for reached in _REACHED_FITTED
    ]
    seconds = [max(a, b * layers) for a, b in zip(arithmetic, launches, strict=True)]
    basis = _H200 if gpu == "H200 SXM" else f"{_H200}, and NVIDIA's data sheet for {gpu}"
    if gpus > 1:
        timed = "two H200s that share the steps" if gpus == 2 else f"two; that {gpus} share the steps was never timed"
        basis = f"{basis}, and on {timed}"
    value, low, high = seconds
    return Figure(value, low, high, basis), takes


def memory(
    gpu: str,
    card: float | None,
    made: Mapping[str, Recipe],
    each: SftRecipe | DpoRecipe,
    counts: Counts,
    shape: Shape | None,
) -> Figure | None:
    """GiB on the GPU, part by part; without one, the process' on the small base. card: as for batch."""
    sft = made.get("sft")
    if shape is None or not isinstance(sft, SftRecipe):
        return None
    if not gpu:
        return _of(_CPU_MEMORY, _DEMO) if shape.parameters <= CPU_LARGEST else None
    if card and each.fit:
        return _fitted(gpu, card, each, sft, counts, shape)[1]
    dpo = isinstance(each, DpoRecipe)
    linear = shape.parameters - shape.embeddings
    weights = shape.embeddings * 2 + linear * (NF4_BYTES if sft.load_in_4bit else 2)
    adapter = shape.adapter(sft.lora_r, sft.target_modules)
    trained = adapter * (WEIGHT + GRADIENT + MOMENTS[each.optim])
    if each.ema_decay:
        trained += adapter * WEIGHT
    tokens = batch_tokens(counts, each)
    # Relative to the 9B's 32 layers of width 4096.
    breadth = shape.layers * shape.width / (NINE_B_LAYERS * 4096)
    kept = tokens * (_KEPT_CHECKPOINTED if each.gradient_checkpointing else _KEPT) * breadth
    if dpo:
        # The reference is a second adapter, and DPO keeps every token's scores over the vocabulary, in float32.
        trained += adapter * WEIGHT
        kept += tokens * shape.vocabulary * 4 / GIB
    total = (weights + trained) / GIB + kept + _RESERVED
    said = f"weights {weights / GIB:.1f}, adapter and optimiser {trained / GIB:.1f}, batch {kept:.1f} GiB; {_H200}"
    return Figure(total, total * (1 - _MEMORY_RANGE), total * (1 + _MEMORY_RANGE), said)


def exporting(cores: int | None, each: ExportRecipe, shape: Shape, *, on_card: bool = False) -> dict[str, Figure]:
    """Seconds of an export's parts. cores: None where the machine is not at hand, which is then taken to have those of
    the measured one. on_card: whether it has an NVIDIA GPU."""
    if shape.parameters <= CPU_LARGEST:
        # The unquantised file is checked as well; the measured export made three more.
        files = (1 + len(each.quants)) / 4
        value = _CPU_EXPORT * files * shape.parameters / SMALL * _CPU_CORES / (cores or _CPU_CORES)
        return {"all of it": Figure(value, value / _CPU_RANGE, value * _CPU_RANGE, _DEMO)}
    size = shape.parameters / NINE_B
    faster = _EXPORT_CORES / (cores or _EXPORT_CORES)
    parts = dict(zip(ALONE, (_of(_MERGE, _H200), _of(_CONVERT, _H200), _of(_MEASURE, _H200)), strict=True))
    # A type that was not timed takes as long as one of those that were.
    usual = statistics.mean(_QUANTISE.values())
    on_cores = [quant for quant in each.quants if not (on_card and quant.startswith(_MADE_ON_CARD))]
    made = sum(_QUANTISE.get(quant, usual) for quant in on_cores)
    quantising = _of([made * share for share in _OVERLAPPED], _H200).times(faster)
    quantising += _of(_QUANTISE_ON_CARD, _H200).times(len(each.quants) - len(on_cores))
    quant, unquantised = (_checking(what, each, on_card) for what in ("quant", "bf16"))
    checking = quant.times(len(each.quants)) + unquantised
    checking = checking if on_card else checking.times(faster)
    together = replace(quantising + checking, low=max(quantising.low, checking.low))
    if on_card:
        # The checks pass while the quants are made; that of the last follows. On the processor all follow.
        value = max(quantising.value, checking.value - quant.value) + quant.value
        together = replace(together, value=value)
    parts[TOGETHER] = together
    return {name: figure.times(size) for name, figure in parts.items()}


def _checking(what: str, each: ExportRecipe, on_card: bool) -> Figure:
    """Seconds of one file's check on the measured machine: every example is read twice and answered, and most replies
    end long before the limit."""
    read = each.check_examples * _EXAMPLE + min(each.check_tokens, each.check_examples * _EXAMPLE)
    value, most = (
        _CHECKED[what] * (each.check_examples * reply + read / 10)
        for reply in (min(_REPLY, each.max_new_tokens), each.max_new_tokens)
    )
    low = value * _CHECKED_ON_CARD
    # On a card whose llama.cpp could not be built for it, the processor checks.
    return Figure(low, low * 0.75, value, _H200) if on_card else Figure(value, low, most, _H200)


def asking(gpu: str, cores: int | None, shape: Shape | None) -> Figure | None:
    """Seconds to put a probe set to one model; None where it was never timed: on a GPU, or with a large base."""
    if gpu or shape is None or shape.parameters > CPU_LARGEST:
        return None
    value = _CPU_PROBE * shape.parameters / SMALL * _CPU_CORES / (cores or _CPU_CORES)
    return Figure(value, value / _CPU_RANGE, value * _CPU_RANGE, _DEMO)


def _of(seconds: Sequence[float], basis: str) -> Figure:
    """From (usual, low, high)."""
    value, low, high = seconds
    return Figure(value, low, high, basis)


def total(figures: Iterable[Figure | None]) -> Figure | None:
    """The sum of those that are known; None where none is."""
    known = [figure for figure in figures if figure is not None]
    return sum(known[1:], known[0]) if known else None
