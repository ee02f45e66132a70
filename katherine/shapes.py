"""A base's dimensions, from its config.json alone: what its weights and an adapter on it weigh, before anything is
fetched or loaded. Which modules a target list really reaches in the loaded class is targets' business."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katherine import bases
from katherine.settings import Home

# transformers 5.17.0: Qwen3_5TextConfig(), which is the published 9B's language model.
_QWEN35_9B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5_text",
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": False,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
}
# The config.json that the small base's package yields.
_SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# bitsandbytes' NF4: 4 bits a weight, and a 32-bit scale for each block of 64.
NF4_BYTES = 0.5 + 4 / 64
# Adapter weights are float32 and so are their gradients; adamw keeps two moments, of one byte each in 8 bit.
WEIGHT, GRADIENT, MOMENTS = 4, 4, {"adamw_8bit": 2, "adamw_torch": 8}
KNOWN: dict[str, dict[str, Any]] = {"Qwen/Qwen3.5-9B": _QWEN35_9B, bases.SMALL: _SMALL}


@dataclass(frozen=True, slots=True)
class Linear:
    """Projections of one name: how many layers have it, and its features in and out."""

    count: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """full_attention: how many of the layers have it; the others' is linear (gated delta). linears: by the last part of
    their name, as in q_proj. Norms, biases and towers beside the language model are not counted: under 0.1% of it."""

    layers: int
    width: int
    vocabulary: int
    tied: bool
    full_attention: int
    linears: dict[str, Linear]

    @property
    def embeddings(self) -> int:
        """Weights of the embedding and the head, which 4-bit loading leaves at 16."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.embeddings + sum(each.count * each.inputs * each.outputs for each in self.linears.values())

    def reached(self, targets: Sequence[str]) -> list[str]:
        """What a target list reaches, a sentence each: the layers whose attention gets an adapter, those that get one
        beside it, and names that this base has not."""
        named = {target for target in targets if target in self.linears}
        beside = {"gate_proj", "up_proj", "down_proj"}
        attention = self.full_attention * bool(named & {"q_proj", "k_proj", "v_proj", "o_proj"})
        attention += (self.layers - self.full_attention) * bool(
            named - beside - {"q_proj", "k_proj", "v_proj", "o_proj"}
        )
        said = [f"The attention of {attention} of {self.layers} layers gets an adapter."]
        if named & beside:
            said.append(f"The MLP of all {self.layers} gets one.")
        if unknown := [target for target in targets if target not in self.linears]:
            said.append(f"This base has no {', '.join(unknown)}.")
        return said

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of an adapter: rank × (inputs + outputs) of every projection that is named."""
        named = (self.linears[target] for target in set(targets) & self.linears.keys())
        return rank * sum(each.count * (each.inputs + each.outputs) for each in named)


def of(home: Home, base: str) -> Shape | None:
    """The shape of a base by name. None where its config is not at hand, or describes another build (a mixture of
    experts, say)."""
    found = config(home, base)
    return _read(found) if found is not None else None


def config(home: Home, base: str) -> dict[str, Any] | None:
    """What a base's config.json says, from a folder, the hub's cache, or what is known of the usual ones; None where
    it is not at hand or cannot be read."""
    for place in (Path(base).expanduser(), *_fetched(home, base)):
        if (place / "config.json").is_file():
            try:
                found = json.loads((place / "config.json").read_bytes())
            except (OSError, ValueError):
                return None
            return found if isinstance(found, dict) else None
    return KNOWN.get(base)


def fetched(home: Home, base: str) -> bool:
    """Whether the base's weights lie in the home already, or in a folder of their own."""
    places = [Path(base).expanduser(), *_fetched(home, base), home.cache / "bases" / base]
    return any(next(place.glob("*.safetensors"), None) is not None for place in places if place.is_dir())


def _fetched(home: Home, base: str) -> list[Path]:
    # The hub library's own naming: models--owner--name/snapshots/<revision>.
    return sorted((home.cache / "hub" / f"models--{base.replace('/', '--')}" / "snapshots").glob("*"))


def _read(config: dict[str, Any]) -> Shape | None:
    text = config.get("text_config") or config
    if any("expert" in name and value for name, value in text.items()):
        return None
    try:
        layers, width, inner = text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"]
        heads = text["num_attention_heads"]
        keys = text.get("num_key_value_heads") or heads
        head = text.get("head_dim") or width // heads
        linear = list(text.get("layer_types") or []).count("linear_attention")
        full = layers - linear
        # Qwen3.5's queries carry the attention's gate beside them.
        gate = 2 if str(text.get("model_type", "")).startswith("qwen3_5") else 1
        linears = {
            "q_proj": Linear(full, width, heads * head * gate),
            "k_proj": Linear(full, width, keys * head),
            "v_proj": Linear(full, width, keys * head),
            "o_proj": Linear(full, heads * head, width),
            "gate_proj": Linear(layers, width, inner),
            "up_proj": Linear(layers, width, inner),
            "down_proj": Linear(layers, inner, width),
        }
        if linear:
            key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
            value = text["linear_num_value_heads"] * text["linear_value_head_dim"]
            linears |= {
                "in_proj_qkv": Linear(linear, width, 2 * key + value),
                "in_proj_z": Linear(linear, width, value),
                "in_proj_a": Linear(linear, width, text["linear_num_value_heads"]),
                "in_proj_b": Linear(linear, width, text["linear_num_value_heads"]),
                "out_proj": Linear(linear, value, width),
            }
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        return Shape(layers, width, text["vocab_size"], bool(tied), full, linears)
    except (KeyError, TypeError, ZeroDivisionError):
        return None
