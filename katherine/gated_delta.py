"""Qwen3.5's gated-delta layer over a packed batch: as transformers' own forward (modeling_qwen3_5, 5.17), but each
sequence starts anew. Needs torch: import it in a job's process only."""

from typing import Any

import torch
from torch.nn import functional

from katherine.fit import CHUNK
from katherine.fused import compiled, short_convolution
from katherine.packing import Batch, gather, spread

# The class in transformers whose forward this stands for.
LAYER = "Qwen3_5GatedDeltaNet"


def forward(self: Any, hidden_states: torch.Tensor, packed: Batch, **_: Any) -> torch.Tensor:
    """(1, tokens, width) → the same; `self` is the layer. With fla's kernels, which know of boundaries, on CUDA; with
    transformers' own arithmetic on the padded view elsewhere."""
    mixed, gate = self.in_proj_qkv(hidden_states)[0], self.in_proj_z(hidden_states)[0]
    beta, decay = self.in_proj_b(hidden_states)[0], self.in_proj_a(hidden_states)[0]
    beta = beta.sigmoid()
    decay = -self.A_log.float().exp() * functional.softplus(decay.float() + self.dt_bias)
    recur = _in_bounds if hidden_states.is_cuda else _padded
    found = recur(self, mixed, beta, decay, packed)
    normed = self.norm(found.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
    return self.out_proj(normed.reshape(1, len(mixed), -1))


def _heads(self: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, tokens, channels) → query, key, value (rows, tokens, heads, size)."""
    query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    query, key = (x.unflatten(-1, (-1, self.head_k_dim)) for x in (query, key))
    return query, key, value.unflatten(-1, (-1, self.head_v_dim))


def _in_bounds(self: Any, mixed: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor, packed: Batch) -> torch.Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # fla keeps what it derives from these by their identity; of a copy it derives anew, also in a captured graph.
    bounds = packed.bounds.clone()
    mixed = compiled(short_convolution)(mixed, self.conv1d.weight.squeeze(1), packed.positions)
    query, key, value = _heads(self, mixed[None])
    found, _ = chunk_gated_delta_rule(
        query,
        key,
        value,
        g=decay[None],
        beta=beta[None],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=bounds,
        chunk_indices=packed.chunks,
        chunk_size=CHUNK,
    )
    return found


def _padded(self: Any, mixed: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor, packed: Batch) -> torch.Tensor:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    rows = spread(mixed, packed).transpose(1, 2)
    rows = theirs.causal_conv1d_fn(rows, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
    query, key, value = _heads(self, rows.transpose(1, 2))
    if (times := self.num_v_heads // self.num_k_heads) > 1:
        query, key = (x.repeat_interleave(times, dim=2) for x in (query, key))
    found, _ = theirs.torch_chunk_gated_delta_rule(
        query, key, value, g=spread(decay, packed), beta=spread(beta, packed), use_qk_l2norm_in_kernel=True
    )
    return gather(found.flatten(2), packed)
