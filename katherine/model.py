"""A base in memory with a LoRA adapter on it: through unsloth on CUDA, transformers and PEFT elsewhere, with the
same module names and so the same adapter files. Where a base comes from is bases' business, training it training's."""

import importlib.util
import os
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from katherine import adapters, gpu
from katherine import kernels as measured
from katherine.errors import ModelError, RecipeError, SetupError
from katherine.fit import Fit
from katherine.progress import Progress
from katherine.settings import Home

# Towers beside the language model. A persona is text: their projections share names with the language model's in
# some families, and must get no adapter. PEFT matches this against a module's whole name.
NOT_LANGUAGE = r"(.*\.)?(visual|vision\w*|image\w*|audio\w*|embed_vision|embed_audio|multi_modal_projector|mtp)(\..*)?"


def on_cuda() -> bool:
    """Whether models run on an NVIDIA GPU here; does not start CUDA."""
    import torch

    return torch.cuda.is_available()


def architecture(checkpoint: Path) -> tuple[Any, Any]:
    """The transformers class that config.json names, and its config. Raises SetupError for one it does not know."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise SetupError(
            f"{checkpoint / 'config.json'} names the model class {name}, which transformers "
            f"{transformers.__version__} does not have. Use a base of another family."
        )
    return found, config


def lora_arguments(lora: adapters.Lora, model: Any) -> dict[str, Any]:
    """PEFT's words for an adapter on the language model alone."""
    # PEFT warns of an exclusion that excludes nothing.
    has_towers = any(re.fullmatch(NOT_LANGUAGE, name) for name, _ in model.named_modules())
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "exclude_modules": NOT_LANGUAGE if has_towers else None,
        "bias": "none",
    }


def settle(home: Home, progress: Progress) -> None:
    """Sets what the libraries read while they are imported; call before anything imports transformers. Quiet, without
    telemetry, and with compiled kernels kept under the home, so that a new machine need not compile them again."""
    os.environ |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # unsloth may otherwise fetch and build llama.cpp, which export brings itself
        "UNSLOTH_AUTO_INSTALL": "0",
    }
    # One GPU a process, the first unless told otherwise.
    os.environ |= gpu.alone(gpu.usable()[0])
    if not on_cuda():
        return
    kernels = home.cache / "kernels" / _kernel_key()
    for variable, folder in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("UNSLOTH_COMPILE_LOCATION", "unsloth_compiled_cache"),
        ("TILELANG_CACHE_DIR", "tilelang"),
    ):
        (kernels / folder).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(kernels / folder)
    # Whoever has set it himself wants otherwise. Where the driver does not say which card it is, or the disk is full,
    # fla tunes as ever: what really needs either will say so.
    with suppress(SetupError, OSError):
        card = gpu.mine()
        if card and "FLA_CACHE_MODE" not in os.environ:
            os.environ |= measured.hand_over(kernels / "fla", card.compute_capability)
    progress.say(f"Compiled kernels are kept in {kernels}.")


def ready(home: Home, progress: Progress, *, fitted: bool) -> None:
    """As settle, for training: imports unsloth where there is a GPU and the training is not `fitted`, so call it before
    anything imports trl. Raises SetupError where unsloth is needed and is not there."""
    settle(home, progress)
    if on_cuda() and not fitted:
        if importlib.util.find_spec("unsloth") is None:
            raise SetupError("This machine has a GPU, but unsloth is not installed: run `bash bootstrap.sh setup`.")
        # It patches trl, transformers and peft while it is imported, so it comes before them.
        import unsloth  # noqa: F401
    _silence()


def _silence() -> None:
    """For libraries that read their settings before ours were set."""
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _kernel_key() -> str:
    """One folder for each GPU and set of compilers: kernels compiled for another would be wrong or unused."""
    # Not torch.cuda.get_device_name: that starts CUDA, and unsloth sets the allocator up before it does.
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        device = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        device = ""
    found = [device or "gpu"]
    for name in ("torch", "triton", "transformers", "trl", "unsloth", "unsloth_zoo", "flash-linear-attention"):
        try:
            found.append(f"{name}-{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return re.sub(r"[^\w.+-]+", "-", "_".join(found))


def load(
    checkpoint: Path,
    lora: adapters.Lora,
    *,
    load_in_4bit: bool,
    max_length: int,
    gradient_checkpointing: bool,
    seed: int,
    fit: Fit | None = None,
) -> Any:
    """The base with a fresh adapter, ready for a trainer: a PeftModel whose one adapter is "default".

    On CUDA in 4 or 16 bit, on a CPU as compute_type says; with `fit` it reads packed batches, laid out so. The
    adapter's first weights depend on `seed` alone, and are float32 everywhere: at a learning rate of 5e-6 a bfloat16
    weight would not move at all.
    Raises RecipeError for 4 bit without CUDA, SetupError for an unknown architecture.
    """
    if not on_cuda() and load_in_4bit:
        raise RecipeError(
            [
                "load_in_4bit is on, and this machine has no CUDA GPU, which quantised training needs: "
                "turn load_in_4bit off (the presets demo and k0-bf16 have it off)."
            ]
        )
    if on_cuda() and fit is None:
        loaded = _load_fast(checkpoint, lora, load_in_4bit, max_length, gradient_checkpointing, seed)
    else:
        loaded = _load_plain(checkpoint, lora, load_in_4bit, seed)
    if fit is not None:
        from katherine import packed_model

        bare = loaded.get_base_model()
        packed_model.install(bare)
        packed_model.recompute(bare, fit.recomputed)
    for parameter in loaded.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return loaded


def _load_plain(checkpoint: Path, lora: adapters.Lora, load_in_4bit: bool, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    model_class, _ = architecture(checkpoint)
    arguments: dict[str, Any] = {"dtype": compute_type()} | (four_bits() if load_in_4bit else {})
    if on_cuda():
        # By its number: accelerate compares it with the device that the trainer counts.
        arguments["device_map"] = {"": 0}
    model = model_class.from_pretrained(checkpoint, local_files_only=True, **arguments)
    set_seed(seed)
    return get_peft_model(model, LoraConfig(**lora_arguments(lora, model), task_type="CAUSAL_LM"))


def _load_fast(
    checkpoint: Path, lora: adapters.Lora, load_in_4bit: bool, max_length: int, gradient_checkpointing: bool, seed: int
) -> Any:
    from unsloth import FastModel

    checkpointing = "unsloth" if gradient_checkpointing else False
    model, _ = FastModel.from_pretrained(
        model_name=str(checkpoint),
        max_seq_length=max_length,
        dtype=compute_type(),
        load_in_4bit=load_in_4bit,
        load_in_16bit=not load_in_4bit,
        # Without this a name could be swapped for a ready-quantised model from the hub.
        use_exact_model_name=True,
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
    )
    return FastModel.get_peft_model(
        model,
        # Its own switch for vision layers stays alone: that one rewrites the targets into a pattern, and the
        # adapter's config would differ from one trained without unsloth.
        **lora_arguments(lora, model),
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
    )


def compute_type() -> Any:
    """The base's torch type: bfloat16 where the GPU or the CPU has arithmetic for it (measured: a third faster than
    float32 on two such cores), else float16 on a GPU, and float32 on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def with_adapter(base: adapters.Base, adapter: Path, *, name: str = "default", four_bit: bool = False) -> Any:
    """The base with a finished adapter on it under `name`: a PeftModel in eval mode, on the GPU where there is one, in
    the type it was trained in, or quantised to 4 bit as training did. Raises ModelError where they do not fit."""
    import torch
    import transformers
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    kind = getattr(transformers, base.model_class, None)
    if kind is None:
        raise ModelError(f"{adapter / 'base.json'} names the class {base.model_class!r}, which transformers lacks.")
    arguments: dict[str, Any] = {"dtype": torch.bfloat16 if four_bit else getattr(torch, base.dtype)}
    if four_bit:
        arguments |= four_bits()
    device = "cuda" if on_cuda() else "cpu"
    try:
        bare = kind.from_pretrained(base.checkpoint, device_map={"": device}, local_files_only=True, **arguments)
        model = PeftModel.from_pretrained(bare, str(adapter), adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter} cannot be put on {base.checkpoint}: {error}") from error
    with safe_open(adapter / adapters.WEIGHTS, "pt") as file:
        theirs = set(file.keys())
    # PEFT only warns of names that do not fit, and would then answer without them.
    if odd := theirs.symmetric_difference(get_peft_model_state_dict(model, adapter_name=name)):
        raise ModelError(
            f"{len(odd)} of the adapter's tensors do not fit {base.model_class} of {base.checkpoint}, such as "
            f"{sorted(odd)[0]}: the adapter belongs to another base."
        )
    return model.eval()


def four_bits() -> dict[str, Any]:
    """Has from_pretrained quantise as unsloth and the QLoRA paper do: NF4, with the block scales quantised too."""
    import torch
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantised}


def describe(name: str, checkpoint: Path, load_in_4bit: bool) -> adapters.Base:
    """What base.json will say of a base loaded on this machine."""
    dtype = str(compute_type()).removeprefix("torch.")
    return adapters.Base(name, str(checkpoint), architecture(checkpoint)[0].__name__, load_in_4bit, dtype)


def tokenizer(checkpoint: Path) -> Any:
    """The tokenizer that the trainers ask for. They only take its padding from it: rendering is template's."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(checkpoint)
    found.pad_token = found.pad_token or found.eos_token
    return found


def adapter_weights(model: Any) -> dict[str, Any]:
    """The adapter's tensors by their names in a saved adapter, on the CPU. A copy."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def set_adapter_weights(model: Any, weights: dict[str, Any], source: Path) -> None:
    """Raises ModelError where `weights` (read from `source`) do not fit the model's adapter, name by name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    wrong = set(expected) ^ set(weights) or {n for n in expected if expected[n].shape != weights[n].shape}
    if wrong:
        raise ModelError(
            f"The adapter in {source} does not fit this base: {len(wrong)} tensors differ, such as {sorted(wrong)[0]}. "
            "Use the base and the targets it was trained with."
        )
    set_peft_model_state_dict(model, weights, adapter_name="default")
