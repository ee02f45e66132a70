"""Which modules a list of target names really matches in a model, layer by layer, found without its weights.
Attaching the adapter is model's business."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katherine import model
from katherine.errors import RecipeError

_IN_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<index>\d+)\.(?P<name>.+)")
_ATTENTION = re.compile(r"attn|attention|mixer", re.I)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. kind: full_attention, linear_attention, …; names are relative to the layer, as self_attn.q_proj."""

    index: int
    kind: str
    matched: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def attention_left_out(self) -> tuple[str, ...]:
        """The attention's modules, where none of them gets an adapter; else nothing."""
        if any(_ATTENTION.search(name) for name in self.matched):
            return ()
        return tuple(name for name in self.left_out if _ATTENTION.search(name))


@dataclass(frozen=True, slots=True)
class TargetReport:
    """`widths` holds in + out features of every matched module: an adapter of rank r adds r × their sum."""

    model_class: str
    layers: tuple[Layer, ...]
    outside: tuple[str, ...]
    widths: int
    parameters: int

    def trainable(self, rank: int) -> int:
        """Parameters of an adapter of this rank."""
        return rank * self.widths

    @property
    def warnings(self) -> list[str]:
        """One sentence for each kind of attention layer that the targets pass by."""
        passed = [layer for layer in self.layers if layer.attention_left_out]
        found = []
        for kind in sorted({layer.kind for layer in passed}):
            names = next(layer.attention_left_out for layer in passed if layer.kind == kind)
            short = ", ".join(name.rpartition(".")[2] for name in names)
            count = sum(layer.kind == kind for layer in passed)
            found.append(
                f"{count} of {len(self.layers)} attention layers ({kind}: {short}) get no LoRA on their attention: "
                "add these names to target_modules, or use the preset all-linear."
            )
        return found

    def lines(self, rank: int | None = None) -> list[str]:
        """The report in words: a line a layer, then totals (an adapter's size where its rank is given), then the
        warnings."""
        said = []
        for layer in self.layers:
            line = f"layer {layer.index:>3}  {layer.kind:<17} {_short(layer.matched) or 'nothing'}"
            said.append(line + (f"  (left out: {_short(layer.left_out)})" if layer.left_out else ""))
        if self.outside:
            said.append(f"outside the layers: {', '.join(self.outside)}")
        modules = sum(len(layer.matched) for layer in self.layers) + len(self.outside)
        total = f"{modules} modules of {self.model_class} ({self.parameters:,} parameters)"
        if rank is not None:
            size = self.trainable(rank)
            total += f", {size:,} trainable at rank {rank} ({size / self.parameters:.2%})"
        return [*said, total, *self.warnings]


def _short(names: Sequence[str]) -> str:
    return " ".join(name.rpartition(".")[2] for name in names)


def matches(checkpoint: Path, target_modules: Sequence[str]) -> TargetReport:
    """Builds the model of the checkpoint's config without weights and asks PEFT what the targets match in it.

    Raises RecipeError naming every target that matches nothing in the language model.
    """
    import torch

    model_class, config = model.architecture(checkpoint)
    with torch.device("meta"):
        skeleton = model_class(config)
    return _report(skeleton, config, target_modules)


def _report(skeleton: Any, config: Any, target_modules: Sequence[str]) -> TargetReport:
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    lora = LoraConfig(target_modules=list(target_modules), exclude_modules=model.NOT_LANGUAGE)
    kinds = getattr(config.get_text_config(), "layer_types", None)
    layers: dict[int, tuple[list[str], list[str]]] = {}
    outside: list[str] = []
    used: Counter[str] = Counter()
    widths = 0
    for name, module in skeleton.named_modules():
        if not isinstance(module, torch.nn.Linear) or re.fullmatch(model.NOT_LANGUAGE, name):
            continue
        matched = bool(check_target_module_exists(lora, name))
        if matched:
            used.update(target for target in target_modules if name == target or name.endswith(f".{target}"))
            widths += module.in_features + module.out_features
        if found := _IN_LAYER.fullmatch(name):
            layers.setdefault(int(found["index"]), ([], []))[0 if matched else 1].append(found["name"])
        elif matched:
            outside.append(name)
    if missing := [target for target in target_modules if not used[target]]:
        raise RecipeError(
            [
                f"target_modules names {', '.join(missing)}, which {type(skeleton).__name__} does not have: "
                "remove them, or use another base."
            ]
        )
    return TargetReport(
        type(skeleton).__name__,
        tuple(
            Layer(index, kinds[index] if kinds else "full_attention", tuple(matched), tuple(left_out))
            for index, (matched, left_out) in sorted(layers.items())
        ),
        tuple(outside),
        widths,
        sum(p.numel() for p in skeleton.parameters()),
    )
