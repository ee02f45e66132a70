"""What a stage is asked to do: typed, bounded values, each with its reason and where it comes from. Forms, the
command line and run.json are all made from these models. Carrying one out is the business of its stage."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from katherine.errors import DataError, NotFound, RecipeError
from katherine.settings import Home

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The gated-delta layers of Qwen3.5 name their projections otherwise, so that the usual list passes them by.
GATED_DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")


# Where a default comes from.
K0 = "the k0 recipe, derived on 1,886 SFT examples and 180 pairs"
READ = "read off the model's own modules"
MEASURED = "measured at the 9B's shape"
CHOSEN = "chosen here; no measurement behind it"


def _field(
    default: Any,
    reason: str,
    source: str,
    *,
    unit: str = "",
    title: str | None = None,
    first: bool = False,
    suggestions: tuple[str, ...] = (),
    **bounds: Any,
) -> Any:
    """A recipe field: its default, why it has that value, who says so, its unit, and pydantic's bounds. title: its name
    for people, where the field's own in words is not it. first: people touch it first. suggestions: usual values of a
    text or a list that takes others too."""
    extra: dict[str, Any] = {
        "reason": reason, "source": source, "unit": unit, "first": first, "suggestions": list(suggestions)
    }  # fmt: skip
    return Field(default, title=title, description=reason, json_schema_extra=extra, **bounds)


class Recipe(BaseModel):
    """Values of one stage. Immutable; unknown names are refused, so that a typing error is never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str]

    def conflicts(self) -> list[str]:
        """Reasons why these values cannot work together, one sentence each; empty where they can."""
        return []


def _absolute(value: str) -> str:
    """A path that is there, made absolute: a run is carried out in another folder than it was asked for in."""
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


class _LoraTraining(Recipe):
    """What SFT and DPO share: the trainer's schedule and the machine's share of it."""

    per_device_batch_size: int = _field(
        16,
        "Short chats: 16 rows fit any card with checkpointing on.",
        K0,
        ge=1,
        le=1024,
        unit="examples",
        title="Batch size",
        first=True,
    )
    gradient_accumulation_steps: int = _field(
        2,
        "16 × 2 = 32 examples a step.",
        K0,
        ge=1,
        le=1024,
        unit="micro-batches",
        title="Gradient accumulation",
        first=True,
    )
    num_train_epochs: int = _field(
        3, "2 leaves the voice thin, 4 overfits.", K0, ge=1, le=50, unit="passes", title="Epochs", first=True
    )
    learning_rate: float = _field(1e-4, "Steadier than 2e-4 over three epochs.", K0, gt=0, le=1e-2, first=True)
    warmup_ratio: float = _field(
        0.05, "Share of the steps during which the rate climbs.", K0, ge=0, le=0.5, title="Warm-up ratio"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = _field(
        "cosine", "Ends gently, so the last batches do not shape the voice.", K0, title="Learning rate schedule"
    )
    weight_decay: float = _field(0.01, "Light regularisation.", K0, ge=0, le=1)
    max_grad_norm: float = _field(
        1.0,
        "Clips a rare wild batch; the trainers' own default.",
        "trl 1.14.2",
        gt=0,
        le=100,
        title="Highest gradient norm",
    )
    optim: Literal["adamw_8bit", "adamw_torch"] = _field(
        "adamw_8bit",
        "8-bit states save about 6 GB at 9B; on a CPU adamw_torch is used, since bitsandbytes needs CUDA.",
        K0,
        title="Optimiser",
    )
    max_length: int = _field(
        1024,
        "Four times the 99th percentile: nothing is left out.",
        K0,
        ge=32,
        le=262_144,
        unit="tokens",
        title="Highest length",
    )
    fit: bool = _field(
        True,
        "Memory decides what of a step is done at once; its examples and its loss stay. Off: as written, by unsloth.",
        MEASURED,
        title="Fit to this machine",
        first=True,
    )
    gradient_checkpointing: bool = _field(True, "About 10% slower, much less memory.", K0)
    held_out: float = _field(
        0.0,
        "Off: a held-out split costs 5 to 10% of small data.",
        K0,
        ge=0,
        le=0.5,
        unit="share",
        title="Held-out share",
    )
    average_checkpoints: int = _field(
        0,
        "Off: mean of the last N checkpoints' adapters; 0 or 1 is off.",
        K0,
        ge=0,
        le=50,
        unit="checkpoints",
        title="Averaged checkpoints",
    )
    ema_decay: float = _field(
        0.0,
        "Off: exponential moving average of the adapter's weights; 0.99 is usual.",
        K0,
        ge=0,
        lt=1,
        title="EMA decay",
    )
    save_steps: int = _field(
        50,
        "A killed run loses at most this much work.",
        "a checkpoint of a rank-64 adapter writes in seconds",
        ge=1,
        le=100_000,
        unit="steps",
        title="Checkpoint every",
    )
    seed: int = _field(20, "Any fixed number: two runs of one recipe see the same order.", CHOSEN, ge=0, le=2**31 - 1)

    @property
    def effective_batch_size(self) -> int:
        return self.per_device_batch_size * self.gradient_accumulation_steps

    def trained_on(self, examples: int) -> int:
        """How many of the examples are trained on once the held-out share is set aside."""
        return examples - math.ceil(examples * self.held_out)

    def steps(self, examples: int) -> int:
        """Optimiser steps the trainer will make. It steps at the end of each epoch even on a part-filled
        accumulation, so this can exceed examples × epochs / effective batch: 180 × 2 / 8 = 45, but
        ceil(ceil(180 / 4) / 2) × 2 = 46. (transformers 5.17, Trainer.set_initial_training_values)"""
        micro_batches = math.ceil(self.trained_on(examples) / self.per_device_batch_size)
        return math.ceil(micro_batches / self.gradient_accumulation_steps) * self.num_train_epochs

    def steps_by_arithmetic(self, examples: int) -> int:
        """examples × epochs / effective batch, rounded: the figure people expect."""
        return round(self.trained_on(examples) * self.num_train_epochs / self.effective_batch_size)

    def steps_explained(self, examples: int) -> str:
        """One sentence: the step count, and why it differs from plain arithmetic where it does."""
        steps, plain = self.steps(examples), self.steps_by_arithmetic(examples)
        if steps == plain:
            return f"{steps} optimiser steps."
        return (
            f"{steps} optimiser steps, not {plain}: each epoch ends with a step of its own, even where its batch is "
            f"not full ({self.trained_on(examples)} examples, {self.effective_batch_size} a step)."
        )

    def conflicts(self) -> list[str]:
        found = []
        if self.average_checkpoints > 1 and self.ema_decay > 0:
            found.append("average_checkpoints and ema_decay both replace the final weights: set one of them to 0.")
        return found


class SftRecipe(_LoraTraining):
    """Supervised fine-tuning of a LoRA adapter: P(reply | conversation), no system prompt."""

    kind: ClassVar[str] = "sft"

    base: str = _field(
        "Qwen/Qwen3.5-9B",
        "The model the persona is put on: a hub id, a folder, or smollm2-135m.",
        K0,
        min_length=1,
        max_length=500,
        title="Base model",
        first=True,
        suggestions=("Qwen/Qwen3.5-9B", "smollm2-135m"),
    )
    load_in_4bit: bool = _field(
        True,
        "QLoRA fits any card; off trains LoRA on the 16-bit base (22 GB at 9B).",
        K0,
        title="Load in 4 bit",
        first=True,
    )
    lora_r: int = _field(
        64,
        "32 is the usual floor, persona work gains from more, 128 overfits 1,886 examples.",
        K0,
        ge=1,
        le=512,
        unit="rank",
        title="LoRA rank",
        first=True,
    )
    lora_alpha: int = _field(128, "2 × rank.", K0, ge=1, le=2048, title="LoRA alpha", first=True)
    lora_dropout: float = _field(
        0.05, "Light regularisation: high rank, small data.", K0, ge=0, le=0.5, title="LoRA dropout"
    )
    target_modules: tuple[str, ...] = _field(
        ATTENTION_AND_MLP,
        "Every linear projection is the intent; on Qwen3.5 this list reaches 8 of 32 attention layers, the preset "
        "all-linear reaches all.",
        f"{K0}; {READ}",
        min_length=1,
        suggestions=ATTENTION_AND_MLP + GATED_DELTA,
    )

    @field_validator("base")
    @classmethod
    def _folder_from_anywhere(cls, value: str) -> str:
        return _absolute(value)

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.lora_alpha > 8 * self.lora_r:
            found.append(
                f"lora_alpha {self.lora_alpha} is more than 8 × lora_r {self.lora_r}: updates that large diverge. "
                f"Use {2 * self.lora_r}."
            )
        if len(set(self.target_modules)) != len(self.target_modules):
            found.append(f"target_modules names a module twice: {', '.join(self.target_modules)}.")
        if bad := [name for name in self.target_modules if not name.replace("_", "").isalnum()]:
            found.append(f"target_modules holds {bad[0]!r}, which is not a module's name such as q_proj.")
        return found


class DpoRecipe(_LoraTraining):
    """Direct preference optimisation of the SFT adapter; the reference is the SFT model itself."""

    kind: ClassVar[str] = "dpo"

    per_device_batch_size: int = _field(
        4,
        "A pair is two rows, and their log-probabilities are kept.",
        K0,
        ge=1,
        le=1024,
        unit="pairs",
        title="Batch size",
        first=True,
    )
    gradient_accumulation_steps: int = _field(
        2, "4 × 2 = 8 pairs a step.", K0, ge=1, le=1024, unit="micro-batches", title="Gradient accumulation", first=True
    )
    num_train_epochs: int = _field(
        2, "Small preference sets converge fast.", K0, ge=1, le=50, unit="passes", title="Epochs", first=True
    )
    learning_rate: float = _field(
        5e-6, "20 to 50 times below SFT, or the voice is forgotten.", K0, gt=0, le=1e-3, first=True
    )
    warmup_ratio: float = _field(0.1, "Longer than SFT's: the run is short.", K0, ge=0, le=0.5, title="Warm-up ratio")
    beta: float = _field(
        0.1, "0.3 to 1.0 holds closer to the reference, 0.01 to 0.05 lets go.", K0, gt=0, le=5, first=True
    )


class ExportRecipe(Recipe):
    """Merge to 16 bit, convert to GGUF, quantise, and accept or mark each file."""

    kind: ClassVar[str] = "export"

    quants: tuple[str, ...] = _field(
        ("q4_k_m", "q5_k_m", "q6_k"),
        "5.6, 6.5 and 7.4 GB at 9B: what a reviewer compares. Any llama.cpp type can be named.",
        K0,
        min_length=1,
        first=True,
        suggestions=("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0"),
    )
    keep_unquantised: bool = _field(
        False,
        "The 16-bit GGUF is 17.9 GB at 9B; keep it to compare quants with it in chat.",
        MEASURED,
        title="Keep the unquantised file",
        first=True,
    )
    check_examples: int = _field(
        24,
        "Examples that each acceptance check reads; more is slower, not stricter.",
        CHOSEN,
        ge=2,
        le=512,
        unit="examples",
        title="Examples to check with",
    )
    check_tokens: int = _field(
        2048,
        "Upper limit of tokens for perplexity and KL: the reference's log-probabilities lie on disk meanwhile, 1 MB a "
        "token at a vocabulary of 248,320.",
        CHOSEN,
        ge=64,
        le=65_536,
        unit="tokens",
        title="Tokens to check with",
    )
    max_kl: float = _field(
        0.25,
        "Mean KL divergence from the unquantised GGUF above which a quant has lost the voice; K-quants of 4 bits and "
        "more lie well under it.",
        CHOSEN,
        gt=0,
        le=10,
        unit="nats a token",
        title="Highest KL divergence",
    )
    max_new_tokens: int = _field(
        200,
        "A reply longer than the corpus' longest has not learned to end.",
        "the k0 corpus: at most about 280 tokens, prompt included",
        ge=8,
        le=4096,
        unit="tokens",
        title="Longest reply",
    )

    def conflicts(self) -> list[str]:
        if len(set(self.quants)) != len(self.quants):
            return [f"quants names a type twice: {', '.join(self.quants)}."]
        return []


class ProbeRecipe(Recipe):
    """Ask a probe set of some models and score the answers by the rules each probe declares."""

    kind: ClassVar[str] = "probe"

    probes: str = _field(
        "katherine",
        "A probe set: its name in the Probes tab, or a path to a TOML file.",
        CHOSEN,
        min_length=1,
        title="Probe set",
        first=True,
    )
    max_new_tokens: int = _field(
        160, "Room for any reply in the corpus' manner.", K0, ge=8, le=4096, unit="tokens", title="Longest answer"
    )
    temperature: float = _field(
        0.0, "0 is greedy: the same answer every time, so that models can be compared.", CHOSEN, ge=0, le=2
    )
    seed: int = _field(20, "Any fixed number.", CHOSEN, ge=0, le=2**31 - 1)
    stages: bool = _field(
        False,
        "Also ask the base, the SFT and the DPO model, before any quant (slow on a CPU).",
        CHOSEN,
        title="Ask the stages too",
        first=True,
    )
    own: bool = _field(
        True, "Ask the files of the export that the run is started on.", CHOSEN, title="Ask the export's own files"
    )
    quants: tuple[str, ...] = _field(
        (),
        "Of the export's own files only these; empty asks all that it offers.",
        CHOSEN,
        title="Of its own files only",
        suggestions=("q4_k_m", "q5_k_m", "q6_k"),
    )
    columns: tuple[str, ...] = _field(
        (),
        "What else to ask, as RUN:quant or base:NAME: files of other exports, or the bare base once it was made.",
        CHOSEN,
        title="Other files to ask",
        max_length=32,
    )

    @field_validator("probes")
    @classmethod
    def _file_from_anywhere(cls, value: str) -> str:
        # A bare name is a set's, even where a folder is called alike.
        return _absolute(value) if value.endswith(".toml") else value

    def conflicts(self) -> list[str]:
        found = []
        if not (self.own or self.columns or self.stages):
            found.append("Nothing would be asked: own and stages are off, and columns is empty.")
        if self.quants and not self.own:
            found.append("quants names files of the export, but own is off: turn it on, or empty quants.")
        for name, values in (("quants", self.quants), ("columns", self.columns)):
            if len(set(values)) != len(values):
                found.append(f"{name} names one twice: {', '.join(values)}.")
        return found


KINDS: dict[str, type[Recipe]] = {r.kind: r for r in (SftRecipe, DpoRecipe, ExportRecipe, ProbeRecipe)}

# What differs from the models' defaults, which are the k0 recipe's values. A preset is named for what it changes.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "k0": {"sft": {}, "dpo": {}, "export": {}},
    "k0-bf16": {"sft": {"load_in_4bit": False}, "dpo": {}, "export": {}},
    "all-linear": {"sft": {"target_modules": ATTENTION_AND_MLP + GATED_DELTA}, "dpo": {}, "export": {}},
    # A 135M model needs larger steps than 9B to change its mind, and a hundred examples need smaller batches to make
    # enough of them. Two rows at a time: on a CPU, rows padded to each other's length cost what real ones do (measured:
    # 136, 184 and 165 tokens a second with 1, 2 and 4 rows). Nothing is quantised, since bitsandbytes needs CUDA, and
    # nothing dropped out, to save the random numbers.
    "demo": {
        "sft": {
            "base": "smollm2-135m",
            "load_in_4bit": False,
            "lora_dropout": 0.0,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "per_device_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "max_length": 512,
        },
        "dpo": {
            "optim": "adamw_torch",
            "learning_rate": 2e-5,
            "per_device_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "max_length": 512,
        },
        "export": {"check_examples": 8, "check_tokens": 1024},
        "probe": {"stages": True, "max_new_tokens": 96},
    },
}

R = TypeVar("R", bound=Recipe)


def _worded(error: dict[str, Any]) -> str:
    """A pydantic error as one sentence with field, value and remedy."""
    name = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{name} is not a field of this recipe: check its spelling."
    return f"{name} is {error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def make(model: type[R], values: dict[str, Any]) -> R:
    """A recipe from plain values (JSON, a form). Raises RecipeError with every reason at once: each field out of
    its bounds, and, judged on the fields that are sound, each conflict between them."""
    reasons: list[str] = []
    bad: dict[str, str] = {}
    try:
        recipe = model.model_validate(values)
    except ValidationError as error:
        reasons = [_worded(dict(e)) for e in error.errors()]
        bad = {str(e["loc"][0]): said for e, said in zip(error.errors(), reasons, strict=True) if e["loc"]}
        try:
            recipe = model.model_validate({k: v for k, v in values.items() if k not in bad})
        except ValidationError:
            raise RecipeError(reasons, bad) from None
    reasons += recipe.conflicts()
    if reasons:
        raise RecipeError(reasons, bad)
    return recipe


def mend(model: type[R], values: Mapping[str, Any], otherwise: R) -> tuple[R, list[str]]:
    """A recipe from values that an older version may have written, and a sentence for each that is given up: a field
    that is no more, or a value that is out of bounds by now, for which `otherwise` stands in."""
    kept = otherwise.model_dump(mode="json") | dict(values)
    try:
        return make(model, kept), []
    except RecipeError as error:
        said = error.reasons
        kept = {k: v for k, v in kept.items() if k in model.model_fields}
        kept |= {name: getattr(otherwise, name) for name in error.fields if name in model.model_fields}
        try:
            return make(model, kept), said
        except RecipeError as conflict:
            return otherwise, [*said, *(reason for reason in conflict.reasons if reason not in said)]


def load(kind: str, values: dict[str, Any]) -> Recipe:
    """The recipe of a run's kind. Raises NotFound for an unknown kind, RecipeError for values that cannot work."""
    if kind not in KINDS:
        raise NotFound(f"There is no kind of run {kind!r}; the kinds are {', '.join(KINDS)}.")
    return make(KINDS[kind], values)


def preset(name: str, model: type[R], changes: Mapping[str, Any] | None = None, home: Home | None = None) -> R:
    """The named preset's recipe of one stage, with `changes` on top. With `home`, presets saved there are known too;
    writing them is the business of presets.

    Raises NotFound for a name, RecipeError for changes that cannot work, DataError for a damaged file."""
    if name in PRESETS:
        return make(model, PRESETS[name].get(model.kind, {}) | dict(changes or {}))
    if home is None or name not in preset_names(home):
        there = preset_names(home) if home else list(PRESETS)
        raise NotFound(f"There is no preset {name!r}; the presets are {', '.join(there)}.")
    path = saved_preset(home, name)
    try:
        values = json.loads(path.read_bytes()).get(model.kind, {})
        saved, _ = mend(model, values, model())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"The saved preset {path} is damaged ({error}). Delete it, or mend the file.") from error
    return make(model, saved.model_dump(mode="json") | dict(changes or {}))


def preset_names(home: Home) -> list[str]:
    """The built-in presets, then those saved in the home, by name."""
    found = sorted(path.stem for path in (home.root / "presets").glob("[!.]*.json"))
    return [*PRESETS, *(name for name in found if name not in PRESETS)]


def saved_preset(home: Home, name: str) -> Path:
    """The file of a preset that was saved, or may be."""
    return home.root / "presets" / f"{name}.json"


@dataclass(frozen=True, slots=True)
class About:
    """What a form or a listing says about a field. label: its name for people, with the unit. limits: its bounds in
    words. first: it belongs to those that people touch first. suggestions: usual values of a text or a list."""

    name: str
    label: str
    unit: str
    reason: str
    source: str
    limits: str
    first: bool
    suggestions: tuple[str, ...]


def about(model: type[Recipe]) -> list[About]:
    """Every field of a recipe, in order, as its model describes it."""
    found = []
    for name, field in model.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        unit = extra.get("unit", "")
        words = field.title or name.replace("_", " ").capitalize()
        label = f"{words} ({unit})" if unit and unit not in words.lower() else words
        found.append(
            About(
                name,
                label,
                unit,
                field.description or "",
                extra.get("source", ""),
                bounds(model, name),
                bool(extra.get("first")),
                tuple(extra.get("suggestions", ())),
            )
        )
    return found


def bounds(model: type[Recipe], name: str) -> str:
    """A field's limits in words, as in "from 1, up to 512"; empty where it has none."""
    words = {"ge": "from", "gt": "over", "le": "up to", "lt": "under", "min_length": "at least one of"}
    said = []
    for limit in model.model_fields[name].metadata:
        for attribute, word in words.items():
            if (value := getattr(limit, attribute, None)) is not None:
                said.append(word if attribute == "min_length" else f"{word} {value:,}")
    return ", ".join(said).replace("at least one of", "not empty")


def differences(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ: name → (this recipe's, the other's)."""
    mine, theirs = recipe.model_dump(), other.model_dump()
    return {name: (mine[name], theirs.get(name)) for name in mine if mine[name] != theirs.get(name)}
