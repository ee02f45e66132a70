"""What transformers computes in ten passes over memory, in one: norms, SwiGLU and the short convolution of Qwen3.5,
compiled by torch's inductor for any number of tokens. The same formulas in the same float32; kernels for them are a
tenth of a step's time. Needs torch: import it in a job's process only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """(tokens, width); `scale` (width,) in float32, 1 + weight for Qwen3.5's centred weights."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(rows, size): the norm of x, times SiLU(gate)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return (normed * functional.silu(gate.float())).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(tokens, inner): SiLU(gate) · up."""
    return (functional.silu(gate.float()) * up.float()).to(gate.dtype)


def short_convolution(x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """SiLU of a causal depthwise convolution that begins anew where `positions` (tokens,) are 0: x (tokens, channels),
    weight (channels, size), its last column for the token itself."""
    size = weight.shape[1]
    taps = weight.float()
    found = x.float() * taps[:, size - 1]
    for back in range(1, size):
        earlier = functional.pad(x, (0, 0, back, 0))[: len(x)].float()
        found = found + torch.where((positions >= back)[:, None], earlier, 0.0) * taps[:, size - 1 - back]
    return functional.silu(found).to(x.dtype)


@functools.cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, compiled once for every number of tokens: its tensors' first dimension."""
    made = torch.compile(function)

    def call(x: torch.Tensor, *others: Any) -> torch.Tensor:
        for each in (x, *others):
            if isinstance(each, torch.Tensor) and len(each) == len(x) and (each.ndim > 1 or each.dtype is torch.int64):
                torch._dynamo.maybe_mark_dynamic(each, 0)
        return made(x, *others)

    return call
