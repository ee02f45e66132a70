"""What a pipeline will take before it is started: steps, seconds, GPU memory, disk and dollars, on this machine and on
the kinds of GPU that have a price. The yardstick's figures, corrected by finished runs on the same kind of GPU; where
neither says anything, there is no figure. What is kept of it with a run is prediction's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from katherine import disk, experience, export, gguf, gpu, hardware, prices, shapes, shelf, units, yardstick
from katherine.checkpoints import KEEP
from katherine.drafts import Draft
from katherine.errors import KatherineError
from katherine.experience import Sample
from katherine.hardware import SHEETS
from katherine.prices import Price
from katherine.recipe import DpoRecipe, ExportRecipe, ProbeRecipe, Recipe, SftRecipe
from katherine.settings import Home
from katherine.shapes import Shape
from katherine.yardstick import GIB, Counts, Figure, total


@dataclass(frozen=True, slots=True)
class Machine:
    """kind: of GPU, as prices name it, "" without one. gpu_memory: bytes. cores: None where it is not this machine, and
    the number is the provider's to say. gpus: how many there are; used: how many a fitted SFT is shared by."""

    kind: str
    here: bool
    gpu_memory: float | None
    cores: int | None
    price: Price | None
    gpus: int = 1
    used: int = 1

    @property
    def hourly(self) -> float | None:
        """Dollars an hour; a price is of one GPU, and a pod of several is paid for whole."""
        return None if self.price is None else self.price.dollars * max(self.gpus, 1)

    @property
    def name(self) -> str:
        kind = self.kind or f"{self.cores} cores, no GPU"
        return f"{kind} (this machine)" if self.here else kind


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage on one machine. parts: seconds of what it does, in order. missing: the parts without a figure. memory:
    GiB on the GPU, or of the process without one. learned: finished runs that the figures come from."""

    kind: str
    parts: dict[str, Figure] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    memory: Figure | None = None
    learned: int = 0

    @property
    def seconds(self) -> Figure | None:
        """Of the parts that are known; None where none is."""
        return total(self.parts.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """A pipeline on one machine. missing: what no figure covers, as "export: merge"; the sums are then at least."""

    machine: Machine
    stages: dict[str, Stage]
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> Figure | None:
        """Of all stages; None where a training has no figure, since what is left would say little."""
        if any("steps" in stage.missing for stage in self.stages.values()):
            return None
        return total(stage.seconds for stage in self.stages.values())

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(f"{stage.kind}: {part}" for stage in self.stages.values() for part in stage.missing)

    @property
    def memory(self) -> Figure | None:
        """That of the stage which needs most, since one runs at a time."""
        known = [stage.memory for stage in self.stages.values() if stage.memory]
        return max(known, key=lambda figure: figure.value) if known else None

    @property
    def memory_of(self) -> str:
        """The kind of the stage that needs most; "" where none is known."""
        known = [stage for stage in self.stages.values() if stage.memory]
        return max(known, key=lambda stage: stage.memory.value).kind if known else ""  # type: ignore[union-attr]

    @property
    def dollars(self) -> Figure | None:
        price, hourly = self.machine.price, self.machine.hourly
        if price is None or hourly is None or self.seconds is None:
            return None
        said = f"{units.dollars(hourly)} an hour, {f'of {price.dated}' if price.dated else price.source}"
        return replace(self.seconds.times(hourly / 3600), basis=said)

    @property
    def learned(self) -> int:
        return sum(stage.learned for stage in self.stages.values())


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes. needed: at the fullest moment, beyond what is there now. kept: what stays. parts: what needs it. free: on
    the home's disk. quota_known: false on a network volume, whose figure is not of what was rented."""

    needed: int
    kept: int
    parts: tuple[tuple[str, int], ...]
    free: int
    quota_known: bool

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


@dataclass(frozen=True, slots=True)
class Plan:
    """What a draft will take. steps: by kind of training; None without a dataset. explained: a sentence a training.
    remarks: what a person should know and no figure says."""

    steps: dict[str, int | None]
    explained: tuple[str, ...]
    disk: Disk | None
    estimates: tuple[Estimate, ...]
    remarks: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- before


def machines(home: Home) -> list[Machine]:
    """This machine, then every kind of GPU that has a price. Raises DataError for a damaged price list."""
    here = hardware.here()
    kind = prices.kind(here.gpu)
    memory = here.gpu_memory if kind else None
    price = prices.hourly(home, here.gpu)
    found = [Machine(kind, True, memory, here.cores, price, here.gpus, len(gpu.usable()))]
    for name, price in prices.listed(home).items():
        if name != kind:
            sheet = SHEETS.get(name)
            found.append(Machine(name, False, sheet.memory if sheet else None, None, price))
    return found


def plan(home: Home, draft: Draft) -> Plan:
    """What the draft's stages will take, here and on each kind of GPU with a price. Raises DataError for a damaged
    price list."""
    made = {kind: draft.recipe(kind) for kind in draft.stages}
    remarks = []
    report = None
    if draft.dataset is None:
        remarks.append("No dataset is chosen: steps, time and dollars depend on it.")
    else:
        try:
            report = counted(home, draft.dataset)
        except KatherineError as error:
            remarks.append(str(error))
    counts = Counts(report)
    steps: dict[str, int | None] = {}
    explained = []
    for kind, each in made.items():
        if isinstance(each, SftRecipe | DpoRecipe):
            count = counts.examples(each)
            steps[kind] = None if count is None else each.steps(count)
            if count is not None:
                explained.append(f"{kind.upper()}: {each.steps_explained(count)}")
            if report is not None and not counts.lengths(kind)[1] and count:
                remarks.append(f"{kind}: the dataset's tokens were not counted; the k0 corpus' lengths are assumed.")
    base = _base(made)
    shape = shapes.of(home, base) if base else None
    here = machines(home)[0]
    if shape and (advice := _precision(here, made, counts, shape)):
        remarks.append(advice)
    if base and shape is None:
        remarks.append(f"Nothing is known of the base {base} before it is fetched: no time, memory or disk for it.")
    past = experience.samples(home)
    return Plan(
        steps,
        tuple(explained),
        _disk(home, made, shape) if shape else None,
        tuple(_estimate(home, machine, made, counts, shape, past) for machine in machines(home)),
        tuple(remarks),
    )


def _precision(here: Machine, made: Mapping[str, Recipe], counts: Counts, shape: Shape) -> str:
    """Whether to load the base in 4 or in 16 bit on this machine, in a sentence with the reason; "" where the recipe
    has it so, or nothing is known. unsloth's guide warns of larger quantisation errors than usual in Qwen3.5."""
    sft = made.get("sft")
    if not here.kind or here.gpu_memory is None or not isinstance(sft, SftRecipe):
        return ""
    wide = sft.model_copy(update={"load_in_4bit": False})
    needed = yardstick.memory(here.kind, here.gpu_memory, dict(made) | {"sft": wide}, wide, counts, shape)
    if needed is None:
        return ""
    room = here.gpu_memory / GIB
    fits = needed.value <= room
    if sft.load_in_4bit and fits:
        return (
            f"Load in 4 bit could be off: the 16-bit base needs about {needed.value:.0f} of the {here.kind}'s "
            f"{room:.0f} GiB, trains as fast, and is not rounded (4 bits cost Qwen3.5 more than usual, it is said)."
        )
    if not sft.load_in_4bit and not fits:
        return (
            f"Turn load in 4 bit on: the 16-bit base needs about {needed.value:.0f} GiB, and the {here.kind} has "
            f"{room:.0f}."
        )
    return ""


def _base(made: Mapping[str, Recipe]) -> str | None:
    sft = made.get("sft")
    return sft.base if isinstance(sft, SftRecipe) else None


def alone(
    home: Home, kind: str, made: Mapping[str, Recipe], dataset: str | None, used: int = 1
) -> tuple[Estimate, int | None]:
    """One stage on this machine, on `used` of its GPUs, and how many optimiser steps it makes, None where it makes none
    or nobody knows. made: its recipe and those of the stages it builds on, by kind. Raises NotFound or DataError for
    the dataset, DataError for a damaged price list."""
    base = _base(made)
    counts = Counts(counted(home, dataset) if dataset else None)
    shape = shapes.of(home, base) if base else None
    here = replace(machines(home)[0], used=used)
    found = _estimate(home, here, made, counts, shape, experience.samples(home), only=kind)
    each = made[kind]
    count = counts.examples(each) if isinstance(each, SftRecipe | DpoRecipe) else None
    return found, each.steps(count) if count and isinstance(each, SftRecipe | DpoRecipe) else None


def counted(home: Home, dataset: str) -> dict[str, Any]:
    """A dataset's report without its problems, which may be a million. Raises NotFound, DataError."""
    return shelf.summary(home, dataset).report


def _estimate(
    home: Home,
    machine: Machine,
    made: Mapping[str, Recipe],
    counts: Counts,
    shape: Shape | None,
    past: Sequence[Sample],
    only: str | None = None,
) -> Estimate:
    stages: dict[str, Stage] = {}
    for kind in made:
        if only in (None, kind):
            alike = [s for s in past if s.kind == kind and _alike(machine, made, s)]
            alike = [s for s in alike if s.hardware.used == _used(machine, made[kind])]
            stages[kind] = _stage(home, kind, machine, made, counts, shape, alike)
    found = Estimate(machine, stages, ())
    return replace(found, warnings=tuple(_warnings(found, made)))


def _warnings(found: Estimate, made: Mapping[str, Recipe]) -> Iterator[str]:
    sft = made.get("sft")
    if not found.machine.kind and isinstance(sft, SftRecipe) and sft.load_in_4bit:
        yield "Loading in 4 bit needs an NVIDIA GPU, and this machine has none: turn it off, or rent one."
    memory, card = found.memory, found.machine.gpu_memory
    if memory is None or card is None or not found.machine.kind:
        return
    room = card / GIB
    needs = f"{found.memory_of} needs about {memory.value:.1f} GiB and {found.machine.kind} has {room:.0f}"
    if memory.value > room:
        yield f"It does not fit: {needs}. Lower the batch size, or load in 4 bit."
    elif memory.high > room:
        yield f"It may not fit: {needs}."


def _alike(machine: Machine, made: Mapping[str, Recipe], sample: Sample) -> bool:
    """Whether a finished run teaches anything about this one: the same kind of GPU, the same base, as loaded."""
    mine, theirs = made.get("sft"), sample.recipes.get("sft")
    if not isinstance(mine, SftRecipe) or not isinstance(theirs, SftRecipe):
        return False
    return (
        prices.kind(sample.hardware.gpu) == machine.kind
        and mine.base == theirs.base
        and mine.load_in_4bit == theirs.load_in_4bit
    )


def _used(machine: Machine, each: Recipe) -> int:
    """On how many GPUs a stage computes."""
    return machine.used if isinstance(each, SftRecipe) and each.fit else 1


def _stage(
    home: Home,
    kind: str,
    machine: Machine,
    made: Mapping[str, Recipe],
    counts: Counts,
    shape: Shape | None,
    alike: Sequence[Sample],
) -> Stage:
    each = made[kind]
    if isinstance(each, SftRecipe | DpoRecipe):
        return _training(home, machine, made, each, counts, shape, alike)
    if isinstance(each, ExportRecipe):
        return _exporting(machine, each, shape, alike)
    assert isinstance(each, ProbeRecipe)
    return _probing(machine, made, each, shape, alike)


# ---------------------------------------------------------------------------------------------------- training


def _training(
    home: Home,
    machine: Machine,
    made: Mapping[str, Recipe],
    each: SftRecipe | DpoRecipe,
    counts: Counts,
    shape: Shape | None,
    alike: Sequence[Sample],
) -> Stage:
    memory = _learned_memory(home, machine, made, each, counts, shape, alike)
    count = counts.examples(each)
    if not count:
        return Stage(each.kind, memory=memory, missing=("steps",))
    parts: dict[str, Figure] = {}
    missing = []
    batches = yardstick.batches(each, count)
    gpus = _used(machine, each)
    batch = yardstick.batch(machine.kind, machine.cores, machine.gpu_memory, made, each, counts, shape, gpus)
    learned = [s for s in alike if s.setup is not None and s.step is not None]
    compiled = machine.here and _compiled(home)
    before = yardstick.before_first_step(machine.kind, each, shape, compiled)
    if learned:
        first = before.get("first step") if compiled else None
        parts["load and first step"] = _seen([(_setup(s, first), s) for s in learned], machine)
    else:
        parts |= before
        if not before:
            missing.append("load")
    ratios = [(ratio, s) for s in learned if (ratio := _ratio(home, s)) is not None]
    if batch and ratios:
        seen = _seen(ratios, machine)
        found = Figure(batch.value * seen.value, batch.value * seen.low, batch.value * seen.high, seen.basis)
        parts["steps"] = found.times(batches)
    elif learned and not batch:
        # Nothing is known of this card but that it made such steps: so many more tokens take so much longer.
        per_token = [(s.step or 0.0) / tokens for s in learned if (tokens := _tokens_a_step(home, s))]
        if per_token:
            seen = _seen(list(zip(per_token, learned, strict=False)), machine)
            parts["steps"] = seen.times(yardstick.batch_tokens(counts, each) * batches)
    elif batch:
        parts["steps"] = batch.times(batches)
    if "steps" not in parts:
        missing.append("steps")
    if learned:
        parts["save"] = _seen([(s.after, s) for s in learned], machine)
    return Stage(each.kind, parts, tuple(missing), memory, len(learned))


def _setup(sample: Sample, first: Figure | None) -> float:
    """What it will take such a run to its first finished step. first: of that step where kernels lie in the cache. A
    step that took longer compiled them, which is over."""
    setup = sample.setup or 0.0
    if first is not None and sample.first > first.high:
        return setup - sample.first + first.value
    return setup


def _compiled(home: Home) -> bool:
    """Whether kernels lie in the cache: of this kind of card, unless the volume has moved between kinds."""
    return any((home.cache / "kernels").glob("*/triton/*"))


# ---------------------------------------------------------------------------------------------------- learning


def _seen(found: Sequence[tuple[float, Sample]], machine: Machine) -> Figure:
    """The mean of what was seen, newest first, each run weighing half of the one after it: caches fill, libraries
    change. Its range is what was seen, and a tenth more."""
    weights = [0.5**age for age in range(len(found))]
    value = sum(weight * seen for weight, (seen, _) in zip(weights, found, strict=True)) / sum(weights)
    each = [seen for seen, _ in found]
    where = "this kind of GPU" if machine.kind else "a machine without a GPU"
    count = f"{len(found)} run{'s' if len(found) > 1 else ''}"
    return Figure(value, min(each) * 0.9, max(each) * 1.1, f"from {count} on {where}")


def _sample_counts(home: Home, sample: Sample) -> Counts:
    try:
        return Counts(counted(home, sample.dataset) if sample.dataset else None)
    except KatherineError:
        return Counts(None)  # the dataset is gone; its lengths are then taken as the k0 corpus'


def _trained(sample: Sample) -> SftRecipe | DpoRecipe:
    made = sample.recipes[sample.kind]
    assert isinstance(made, SftRecipe | DpoRecipe)
    return made


def _ratio(home: Home, sample: Sample) -> float | None:
    """How a run's steps compare with what would have been said of them: a run with other batches teaches too."""
    made = _trained(sample)
    sft = sample.recipes.get("sft")
    shape = shapes.of(home, sft.base) if isinstance(sft, SftRecipe) else None
    machine = sample.hardware
    gpu, counts = prices.kind(machine.gpu), _sample_counts(home, sample)
    said = yardstick.batch(gpu, machine.cores, machine.gpu_memory, sample.recipes, made, counts, shape, machine.used)
    if said is None or sample.step is None:
        return None
    return sample.step / (said.value * yardstick.batches_a_step(made))


def _tokens_a_step(home: Home, sample: Sample) -> float:
    made = _trained(sample)
    return yardstick.batch_tokens(_sample_counts(home, sample), made) * yardstick.batches_a_step(made)


def _learned_memory(
    home: Home,
    machine: Machine,
    made: Mapping[str, Recipe],
    each: SftRecipe | DpoRecipe,
    counts: Counts,
    shape: Shape | None,
    alike: Sequence[Sample],
) -> Figure | None:
    """What is added up, corrected by what such runs needed beyond it."""
    added = yardstick.memory(machine.kind, machine.gpu_memory, made, each, counts, shape)
    beyond = []
    for sample in alike:
        card, before = sample.hardware.gpu_memory, _sample_counts(home, sample)
        said = yardstick.memory(machine.kind, card, sample.recipes, _trained(sample), before, shape)
        if said is not None and sample.memory is not None:
            beyond.append((sample.memory - said.value, sample))
    if added is None or not beyond:
        return added
    seen = _seen(beyond, machine)
    value = added.value + seen.value
    low, high = (added.value + bound for bound in (min(b for b, _ in beyond), max(b for b, _ in beyond)))
    parts = added.basis.partition(";")[0]
    return Figure(value, low * 0.95, high * 1.05, f"{parts}; {seen.basis}" if machine.kind else seen.basis)


# ---------------------------------------------------------------------------------------------------- after training


def _exporting(machine: Machine, each: ExportRecipe, shape: Shape | None, alike: Sequence[Sample]) -> Stage:
    memory = None
    if shape and machine.kind:
        # The adapter is merged into the 16-bit base, on the card where there is one.
        value = shape.parameters * 2 / GIB
        memory = Figure(value, value, value * 1.25, "the 16-bit base, to merge the adapter into")
    # An export whose parts did not overlap yet says little about one whose do.
    learned = [s for s in alike if export.TOTAL in s.parts]
    if learned:
        parts = {
            name: _seen([(s.parts[name] * _slower(s, machine), s) for s in learned], machine)
            for name in yardstick.ALONE
        }
        after = [(_together(s, each) * _slower(s, machine), s) for s in learned]
        start = [(max(s.seconds - s.parts[export.TOTAL], 0.0), s) for s in learned]
        parts |= {yardstick.TOGETHER: _seen(after, machine), "start": _seen(start, machine)}
        return Stage(each.kind, parts, (), memory, len(learned))
    if shape is None:
        return Stage(each.kind, missing=("all of it",))
    parts = yardstick.exporting(machine.cores, each, shape, on_card=bool(machine.kind))
    return Stage(each.kind, parts, (), memory)


def _together(sample: Sample, each: ExportRecipe) -> float:
    """Seconds of what follows the parts that stand alone, moved to the number of files that will be made: every quant
    and the unquantised one, which is checked too."""
    made = sample.recipes["export"]
    assert isinstance(made, ExportRecipe)
    rest = sample.parts[export.TOTAL] - sum(sample.parts[name] for name in yardstick.ALONE)
    return max(rest, 0.0) * (1 + len(each.quants)) / (1 + len(made.quants))


def _slower(sample: Sample, machine: Machine) -> float:
    """Converting, quantising and checking are shared among the cores."""
    return sample.hardware.cores / machine.cores if machine.cores else 1.0


def _probing(
    machine: Machine,
    made: Mapping[str, Recipe],
    each: ProbeRecipe,
    shape: Shape | None,
    alike: Sequence[Sample],
) -> Stage:
    """By the models that are asked: the files, and with `stages` the base, the SFT and the DPO model."""
    asked = _asked(made, each)
    seen = [(s.seconds / models, s) for s in alike if (models := _asked(s.recipes, s.recipes["probe"]))]
    if asked and seen:
        return Stage(each.kind, {"ask": _seen(seen, machine).times(asked)}, learned=len(seen))
    said = yardstick.asking(machine.kind, machine.cores, shape)
    if asked and said:
        return Stage(each.kind, {"ask": said.times(asked)})
    return Stage(each.kind, missing=("ask",))


def _asked(made: Mapping[str, Recipe], each: Recipe) -> int:
    assert isinstance(each, ProbeRecipe)
    exported = made.get("export")
    files = len(exported.quants) + exported.keep_unquantised if isinstance(exported, ExportRecipe) else 0
    own = min(files, len(each.quants) or files) if each.own else 0
    return own + len(each.columns) + (1 + sum(kind in made for kind in ("sft", "dpo")) if each.stages else 0)


# ---------------------------------------------------------------------------------------------------- disk


def _disk(home: Home, made: Mapping[str, Recipe], shape: Shape) -> Disk:
    """Checkpoints and adapters of each training, which stay, and the export at its fullest, as export reckons it."""
    sft = made["sft"]
    assert isinstance(sft, SftRecipe)
    parts: list[tuple[str, int]] = []
    if not shapes.fetched(home, sft.base):
        parts.append(("the base", shape.parameters * 2))
    adapter = shape.adapter(sft.lora_r, sft.target_modules)
    for kind, each in made.items():
        if isinstance(each, SftRecipe | DpoRecipe):
            checkpoint = adapter * (
                shapes.WEIGHT + shapes.MOMENTS[each.optim] + (shapes.WEIGHT if each.ema_decay else 0)
            )
            # One more than are kept, while it is written.
            held = max(KEEP, each.average_checkpoints) + 1
            parts.append((f"{kind.upper()} checkpoints and adapter", checkpoint * held + adapter * shapes.WEIGHT))
    kept = sum(size for _, size in parts)
    fullest = 0
    exported = made.get("export")
    if isinstance(exported, ExportRecipe):
        dimensions = export.Shape(shape.parameters, shape.vocabulary, shape.width)
        fullest = export.fullest(dimensions, exported.quants, exported.check_tokens)
        parts.append(("the export at its fullest", fullest))
        files = sum(gguf.nominal_bytes(shape.parameters, quant, shape.width) for quant in exported.quants)
        kept += files + (shape.parameters * 2 if exported.keep_unquantised else 0)
    room = disk.room(home.root)
    needed = sum(size for _, size in parts)
    return Disk(needed, kept, tuple(parts), room.free, room.quota_known)


# ---------------------------------------------------------------------------------------------------- in words


def words(figure: Figure | None, form: Callable[[float], str], at_least: bool = False) -> str:
    """ "4 min 10 s (3 min to 6 min)"; with "at least" where parts are missing; empty for None."""
    if figure is None:
        return ""
    value, low, high = form(figure.value), form(figure.low), form(figure.high)
    said = value if low == value == high else f"{value} ({low} to {high})"
    return f"at least {said}" if at_least else said


def roughly(seconds: float) -> str:
    """A duration no finer than an estimate is: to 5 s under two minutes, to the minute under two hours."""
    grain = 1 if seconds < 10 else 5 if seconds < 120 else 60 if seconds < 7200 else 300
    return units.duration(round(seconds / grain) * grain)


def gib(value: float) -> str:
    return f"{value:.1f} GiB"
