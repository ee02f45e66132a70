"""A model's forward and backward pass captured once as CUDA graphs and replayed for every batch of the same size: a
step of short chats launches ten thousand small kernels, and issuing them one by one from Python takes longer than the
GPU needs to run them. Needs torch and a GPU."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from katherine.packing import Batch, Size

# Triton tunes its kernels and cuBLAS takes its workspace the first times; neither may happen while capturing.
WARM_UP = 2


class Replay:
    """forward: a batch → hidden states (tokens, width) that depend on `parameters`. Graphs of different sizes share
    one memory pool, since a batch's backward pass is over before the next forward pass begins."""

    def __init__(self, forward: Callable[[Batch], torch.Tensor], parameters: Sequence[torch.nn.Parameter]):
        self._forward = forward
        self._parameters = list(parameters)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Size, _Captured] = {}
        self._anchor = torch.zeros((), device="cuda", requires_grad=True)

    @property
    def sizes(self) -> Collection[Size]:
        """Those that were captured."""
        return self._graphs.keys()

    def __call__(self, batch: Batch) -> torch.Tensor:
        if batch.size not in self._graphs:
            self._graphs[batch.size] = _Captured(self._forward, self._parameters, batch, self._pool)
        return _Replayed.apply(self._anchor, self._graphs[batch.size], batch)


class _Captured:
    """One size. Inputs, hidden states and gradients stay where they were when it was captured."""

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        parameters: list[torch.nn.Parameter],
        batch: Batch,
        pool: Any,
    ):
        self.parameters = parameters
        self.inputs = {name: getattr(batch, name).clone() for name in READ}
        own = replace(batch, **self.inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                hidden = forward(own)
                torch.autograd.grad(hidden, parameters, torch.zeros_like(hidden))
        torch.cuda.current_stream().wait_stream(side)
        del hidden
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # NCCL watches its operations from a thread of its own, which may ask CUDA something at any moment.
        mode = "thread_local" if torch.distributed.is_initialized() else "global"
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode=mode):
            hidden = forward(own)
        self.upstream = torch.zeros_like(hidden)
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode=mode):
            self.gradients = torch.autograd.grad(hidden, parameters, self.upstream)
        self.hidden = hidden.detach()

    def load(self, batch: Batch) -> None:
        for name, kept in self.inputs.items():
            kept.copy_(getattr(batch, name), non_blocking=True)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, graph: _Captured, batch: Batch) -> torch.Tensor:
        graph.load(batch)
        graph.forward.replay()
        ctx.graph = graph
        return graph.hidden.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        graph: _Captured = ctx.graph
        graph.upstream.copy_(upstream)
        graph.backward.replay()
        held = [parameter.grad for parameter in graph.parameters if parameter.grad is not None]
        if held:
            torch._foreach_add_(held, list(graph.gradients))
        else:
            # Copies, since the next replay overwrites them.
            for parameter, gradient in zip(graph.parameters, torch._foreach_mul(graph.gradients, 1.0), strict=True):
                parameter.grad = gradient
        return None, None, None


# What a forward pass reads of a batch; the rest is for the head, which is not captured.
READ = ("ids", "positions", "place", "spread", "bounds", "chunks")
