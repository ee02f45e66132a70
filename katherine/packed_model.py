"""A transformers model that reads packed batches: what is replaced in it, and its hidden states. The replaced parts
compute what they computed before; packing, gated_delta, lora and fused own how, and fit knows which models can. Needs
torch: import it in a job's process only."""

import functools
import types
from typing import Any

import torch

from katherine import gated_delta, lora, packing
from katherine.fused import compiled, gated_rms_norm, rms_norm, swiglu
from katherine.packing import Batch


def backbone(model: Any) -> Any:
    """The text model that gives hidden states."""
    return getattr(model.model, "language_model", model.model)


def install(model: Any) -> None:
    """Teaches a transformers model, of a class that fit knows, to read packed batches; from then on it reads nothing
    else. `model`: without PEFT around it, though its layers carry adapters."""
    from transformers import AttentionInterface

    AttentionInterface.register(packing.ATTENTION, packing.attention)
    text = backbone(model)
    text.config._attn_implementation = packing.ATTENTION
    for layer in text.layers:
        if type(getattr(layer, "linear_attn", None)).__name__ == gated_delta.LAYER:
            layer.linear_attn.forward = types.MethodType(gated_delta.forward, layer.linear_attn)
    lora.install(text)
    if next(text.parameters()).is_cuda:
        _fuse(text)


def _fuse(text: Any) -> None:
    """One kernel in place of transformers' ten, for each norm and each SwiGLU. The norms' weights are frozen."""

    def centred(self: Any, x: torch.Tensor) -> torch.Tensor:
        return compiled(rms_norm)(x.reshape(-1, x.shape[-1]), self.scale, self.eps).view_as(x)

    def gated(self: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return compiled(gated_rms_norm)(x, gate, self.weight, self.variance_epsilon)

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(compiled(swiglu)(self.gate_proj(x)[0], self.up_proj(x)[0])[None])

    for module in text.modules():
        match type(module).__name__:
            case "Qwen3_5RMSNorm":
                module.register_buffer("scale", 1.0 + module.weight.detach().float(), persistent=False)
                module.forward = types.MethodType(centred, module)
            case "Qwen3_5RMSNormGated":
                module.forward = types.MethodType(gated, module)
            case "Qwen3_5MLP":
                module.forward = types.MethodType(mlp, module)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """(tokens, width) of an installed model, before its head."""
    found = backbone(model)(
        input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, packed=batch
    )
    return found.last_hidden_state[0]


def recompute(model: Any, layers: int) -> None:
    """Has the first `layers` layers do their forward pass again in the backward pass instead of keeping it."""
    from torch.utils.checkpoint import checkpoint

    for index, layer in enumerate(backbone(model).layers):
        layer.gradient_checkpointing = index < layers
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
