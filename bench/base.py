"""Checkpoints with random weights in the published Qwen3.5 form: vision tower, text model and multi-token-prediction
tensors, in shards with an index, beside a tokenizer and a chat template with Qwen3.5's thinking switch. For tests
(tiny) and for measuring (9b); what a trained base answers is not their business."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from katherine import bases, settings

Shape = Literal["tiny", "9b"]

# Behaves as Qwen3.5's: only the reply after the last user turn shows the (empty) thought, and the generation prompt
# opens a thought unless enable_thinking is false.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if last.user < 0 -%}{{- raise_exception('The messages hold no user turn.') -}}{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and loop.index0 > last.user -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
    {{- message.content | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- else -%}
        {{- '<think>\\n' -}}
    {%- endif -%}
{%- endif -%}
"""
# Control tokens that Qwen3.5's tokenizer has and the small base's has not.
_THINKING = ("<think>", "</think>")
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# llama.cpp and the K-quants want widths divisible by 256; embedding rows exceed the tokenizer, as published.
_ROWS = 256

_TINY_TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
_TINY_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_position_embeddings": 16,
}


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Fills `folder` (made if absent). tiny: 4 layers, one of full attention, some 50 MB, a second on a CPU.
    9b: the real shape, 18 GB in bf16, written from a GPU where there is one. The weights are those of seed 0."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder)
    config = Qwen3_5Config(
        text_config=_text_config(shape, ids),
        vision_config=_TINY_VISION | {"out_hidden_size": 256} if shape == "tiny" else {"out_hidden_size": 4096},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = torch.get_default_dtype()
    set_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = Qwen3_5ForConditionalGeneration(config)
            extra = _multi_token_prediction(config.text_config)
    finally:
        torch.set_default_dtype(usual)
    config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    # The published 9B comes in four shards of about this size.
    model.save_pretrained(folder, max_shard_size="5GB")
    _add_shard(folder, extra)
    _write_preprocessor(folder)


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """The small base's tokenizer with Qwen3.5's control tokens on top. Returns the control tokens' ids."""
    from tokenizers import AddedToken, Tokenizer

    source = bases.tokenizer(settings.home(), bases.SMALL)
    built = Tokenizer.from_file(str(source / "tokenizer.json"))
    built.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _VISION])
    # As in the published tokenizer, a thought's tags are control tokens that decoding does not skip.
    built.add_tokens([AddedToken(t, special=False, normalized=False) for t in _THINKING])
    built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {token.content: i for i, token in built.get_added_tokens_decoder().items()}


def _text_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    # interleaved rotary sections fill half the rotated quarter of a head: 32 at the 9B, 8 at the tiny shape
    sections = [3, 3, 2] if shape == "tiny" else [11, 11, 10]
    rows = -(-(max(ids.values()) + 1) // _ROWS) * _ROWS
    return (_TINY_TEXT | {"vocab_size": rows} if shape == "tiny" else {}) | {
        "eos_token_id": ids["<|im_end|>"],
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": sections,
        },
    }


def _multi_token_prediction(config: Any) -> dict[str, Any]:
    """The `mtp.*` tensors beside the model: one full-attention layer and what feeds it. transformers has no module
    for them, and drops them on load."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

    layer = Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))
    tensors = {f"mtp.layers.0.{name}": value.detach() for name, value in layer.state_dict().items()}
    width = config.hidden_size
    # Norms are centred on 1 + weight, so 0 is neutral.
    norms = ("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
    return (
        tensors
        | {"mtp.fc.weight": torch.randn(width, 2 * width) * config.initializer_range}
        | {name: torch.zeros(width) for name in norms}
    )


def _add_shard(folder: Path, tensors: dict[str, Any]) -> None:
    """Puts `tensors` in a shard of their own and renames every shard to tell how many there are."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(folder.glob("model*.safetensors"))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors"
        with safe_open(shard, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), name)
        shard.rename(folder / name)
    last = f"model-{len(shards) + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / last, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, last)
    size = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_preprocessor(folder: Path) -> None:
    """What an image processor asks for; no image is ever given to it, but loaders look for the file."""
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        # pixels: from 256 × 256 up to 4096 × 4096
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    }
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        (folder / name).write_text(json.dumps(common | kind, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.base", description=__doc__)
    parser.add_argument("folder", type=Path, help="an absent or empty folder")
    parser.add_argument("--shape", choices=("tiny", "9b"), default="tiny")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is not empty: name another folder.", file=sys.stderr)
        return 1
    try:
        write_checkpoint(folder, arguments.shape)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
