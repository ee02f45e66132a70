"""LoRA's arithmetic in fewer passes over memory than PEFT's own layers make, on the layers and weights that PEFT made:
y = W·x + scale · B·A·dropout(x), with W frozen, in 16 bit or NF4. Needs torch: import it in a job's process only.

PEFT casts x to the adapter's float32 and back, scales, clones and adds in passes of their own; at 9B that is a seventh
of a step. Here x stays as it is, the scale goes into B, and the matrix product adds."""

import types
from typing import Any

import torch


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: Any, scale: float, dropout: float
    ) -> torch.Tensor:
        y = x @ dense(weight, x.dtype).t()
        narrow_a, narrow_b = a.to(x.dtype), (b * scale).to(x.dtype)
        mask = None
        if dropout > 0:
            x, mask = torch.native_dropout(x, dropout, True)
        low = x @ narrow_a.t()
        y.addmm_(low, narrow_b.t())
        ctx.save_for_backward(x, low, narrow_a, narrow_b, mask)
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, low, narrow_a, narrow_b, mask = ctx.saved_tensors
        low_upstream = upstream @ narrow_b
        for_a = low_upstream.t() @ x
        for_b = upstream.t() @ low
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = upstream @ dense(ctx.weight, upstream.dtype)
            if mask is None:
                for_x.addmm_(low_upstream, narrow_a)
            else:
                dropped = low_upstream @ narrow_a
                for_x += torch.ops.aten.native_dropout_backward(dropped, mask, 1 / (1 - ctx.dropout))
        return for_x, for_a.float(), for_b.float() * ctx.scale, None, None, None


def dense(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A frozen weight, (outputs, inputs), in the type to compute in; NF4 is widened anew each time."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


def _forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of a PEFT layer's forward: (..., inputs) → (..., outputs), under its one active adapter, or none."""
    base = self.get_base_layer()
    flat = x.reshape(-1, x.shape[-1])
    if self.disable_adapters:
        y = flat @ dense(base.weight, x.dtype).t()
    else:
        (name,) = self.active_adapters
        dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        y = _Lora.apply(
            flat, self.lora_A[name].weight, self.lora_B[name].weight, base.weight, self.scaling[name], dropout
        )
    if base.bias is not None:
        y = y + base.bias
    return y.view(*x.shape[:-1], -1)


def install(model: Any) -> int:
    """Has the LoRA layers in a model compute so, and says how many there are. Variants of LoRA, of which we make none,
    are left as they are."""
    from peft.tuners.lora import LoraLayer

    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and hasattr(module.get_base_layer(), "weight") and not module.lora_variant:
            changed: Any = module
            changed.forward = types.MethodType(_forward, module)
            count += 1
    return count
