"""An adapter's folder: the two files of PEFT, and base.json, which says what it was trained on. Putting one on a base
in memory is the business of model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from katherine import bases
from katherine.errors import NotFound
from katherine.runs import write_json
from katherine.settings import Home

WEIGHTS = "adapter_model.safetensors"
FILES = (WEIGHTS, "adapter_config.json", "base.json")


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter is made of; r, alpha and dropout as in PEFT's LoraConfig."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]


class Base(msgspec.Struct, frozen=True):
    """base.json beside an adapter: what it was trained on. `name` is the recipe's word for it, `checkpoint` its folder
    then, `model_class` the class of transformers, `dtype` its compute type, e.g. "bfloat16"."""

    name: str
    checkpoint: str
    model_class: str
    load_in_4bit: bool
    dtype: str


def base_of(home: Home, adapter: Path) -> Base:
    """What an adapter was trained on. Its `checkpoint` is there: where the home moved, or its cache was emptied, the
    base is got anew by its name. Raises NotFound where the folder is no adapter of a finished run, else what
    bases.checkpoint raises."""
    path = adapter / "base.json"
    try:
        base = msgspec.json.decode(path.read_bytes(), type=Base)
    except FileNotFoundError:
        raise NotFound(f"{adapter} has no base.json: give the adapter folder of a finished SFT or DPO run.") from None
    except msgspec.MsgspecError as error:
        raise NotFound(f"{path} is damaged ({error}): train the adapter again.") from error
    if Path(base.checkpoint).is_dir():
        return base
    return msgspec.structs.replace(base, checkpoint=str(bases.checkpoint(home, base.name)))


def lora_of(adapter: Path) -> Lora:
    """What a saved adapter is made of."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return Lora(config["r"], config["lora_alpha"], config["lora_dropout"], tuple(sorted(config["target_modules"])))


def read_weights(folder: Path) -> dict[str, Any]:
    """An adapter folder's tensors, on the CPU."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def save(model: Any, weights: dict[str, Any], folder: Path) -> None:
    """Writes the two files of a PEFT adapter."""
    from safetensors.torch import save_file

    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(_plain(config), indent=2, sort_keys=True))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def write_base(folder: Path, base: Base) -> None:
    write_json(folder / "base.json", msgspec.to_builtins(base))


def _plain(value: Any) -> Any:
    """A PEFT config's values as JSON holds them: sets sorted, enums by their value."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if hasattr(value, "value") else value
