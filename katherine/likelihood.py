"""Log-probabilities of given tokens under a model's frozen head, without keeping the logits: at a vocabulary of 248,320
those of 2,000 tokens are 2 GB in float32, and their gradient as much again. Needs torch."""

from typing import Any

import torch

# Logits in float32 at a time: 64 million take 256 MiB, and a chunk of 270 tokens at Qwen3.5's vocabulary.
CHUNK = 1 << 26


class _TokenLogprobs(torch.autograd.Function):
    """The gradient is made on the way forward, while the logits are there: for the log-probability of token y it is
    W[y] - Σ p·W. Backward only scales it, so neither pass holds more than a chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int, wanted: bool
    ) -> torch.Tensor:
        rows = max(1, chunk // len(weight))
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).float()
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            own = labels[part, None]
            found[part] = logits.gather(1, own).squeeze(1)
            if gradient is not None:
                shares = logits.exp_().neg_()
                shares.scatter_add_(1, own, torch.ones_like(own, dtype=shares.dtype))
                torch.mm(shares.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """hidden (tokens, width), weight (vocabulary, width), labels (tokens,) → log p(label), float32 (tokens,), in nats.

    The weight gets no gradient. `chunk`: logits held at a time, in numbers."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return _TokenLogprobs.apply(hidden.to(weight.dtype), weight, labels, chunk, wanted)
