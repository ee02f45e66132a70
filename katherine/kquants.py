"""llama.cpp's K-quants of 4, 5 and 6 bits, reckoned by torch: on a GPU a 9B takes seconds, for which sixteen cores need
a minute a file. Writing files of them is requantise's work. Needs torch: import it in a job's process only.

Which numbers stand for a block is a search: candidate scales are tried one after another, and the one with the least
weighted error is kept. The order of its additions decides between neighbours, so each sum here runs in llama.cpp's
order and each product is rounded by itself, and the bytes are the same as its own (`quantize_row_q4_K_ref` and its like
in ggml-quants.c; tests/test_kquants.py holds one against the other). Four traps of torch's: a number divided by a
tensor, and a tensor by a number, become products with a reciprocal; `sum` adds in an order of its own; roots may be a
bit off; compiled, a product and an addition become one operation without the rounding between them. So nothing here is
compiled."""

from collections.abc import Callable
from typing import Any

import torch

# Weights that share a half-precision scale.
SUPER_BLOCK = 256
# Below this a block of six bits counts as nothing but zeros (GROUP_MAX_EPS).
_NOTHING = 1e-15


def types() -> dict[str, int]:
    """The types that can be made, by llama.cpp's names, with the bytes of a super-block."""
    return {name: size for name, (_, size) in _ENCODERS.items()}


def encode(values: Any, kind: str) -> Any:
    """A quantised tensor's bytes, uint8 of shape (super-blocks, bytes of one), where `values` are.

    values: float32 or bfloat16, finite, (..., width) with a width that super-blocks divide. kind: as in "q4_K".
    Raises KeyError for a kind that is not known, ValueError for another width.
    """
    make, _ = _ENCODERS[kind]
    if values.shape[-1] % SUPER_BLOCK:
        raise ValueError(f"Rows of {values.shape[-1]} weights are not divided by super-blocks of {SUPER_BLOCK}.")
    return make(values.to(torch.float32).reshape(-1, SUPER_BLOCK))


def _asymmetric(bits: int, least: float, steps: int) -> Callable[[Any], Any]:
    """Blocks of 32 with a scale and a minimum: x = d·scale·q - dmin·minimum."""
    most = 2**bits - 1

    def make(rows: Any) -> Any:
        # One block a column: an addition over the blocks' n-th weights is one operation on memory that lies together.
        x = rows.reshape(-1, 32).t().contiguous()
        scale, minimum, searched = _search_with_minimum(x, most, least, steps)
        scales, minima = scale.view(-1, 8), minimum.view(-1, 8)
        largest, deepest = (torch.where(each > 0, each, 0).amax(1) for each in (scales, minima))
        six = [_six_bits(largest, scales), _six_bits(deepest, minima)]
        d, dmin = (_over(each, 63).half() for each in (largest, deepest))
        each_d = (d.float()[:, None] * six[0]).view(-1)
        each_dmin = (dmin.float()[:, None] * six[1]).view(-1)
        q = _nearest((x + each_dmin) / each_d).clamp_(0, most)
        # Where the scale is nothing in half precision, what the search found stands.
        q = torch.where(each_d == 0, searched, q).to(torch.uint8)
        q = q.t().reshape(-1, 4, 2, 32)
        low = q & 15
        parts = [d[:, None].view(torch.uint8), dmin[:, None].view(torch.uint8), _packed_scales(*six)]
        if bits == 5:
            high = q >> 4
            shifts = torch.arange(8, device=x.device, dtype=torch.uint8).view(4, 2, 1)
            parts.append((high << shifts).sum((1, 2), dtype=torch.uint8))
        parts.append((low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128))
        return torch.cat(parts, 1)

    return make


def _search_with_minimum(x: Any, most: int, least: float, steps: int) -> tuple[Any, Any, Any]:
    """Each block's scale and minimum (what is taken away, not below 0), and the numbers that the search gave its
    weights. x: (32, blocks). Of llama.cpp's make_qkx2_quants."""
    squares = x * x
    weights = _root(_sum(squares) / 32) + x.abs()
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    flat = high == low
    first_low = low
    iscale = _from(most, high - low)
    scale = _from(1, iscale)
    q = _nearest(iscale * (x - low)).clamp_(0, most)
    best = _error(q, scale, low, x, weights)
    best_iscale, best_low = iscale, low
    products = x.new_empty(3, *x.shape)
    for step in range(steps + 1):
        iscale = _from(_f32(least) + _f32(0.1) * step + most, high - low)
        q = _nearest(iscale * (x - low)).clamp_(0, most)
        torch.mul(weights, q, out=products[0])
        torch.mul(products[0], q, out=products[1])
        torch.mul(products[0], x, out=products[2])
        sum_l, sum_l2, sum_xl = _sum(products.transpose(0, 1))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = this_low > 0
        this_scale = torch.where(above, sum_xl / sum_l2, this_scale)
        this_low = torch.where(above, 0, this_low)
        error = _error(q, this_scale, this_low, x, weights)
        better = (determinant > 0) & (error < best)
        # The next candidates are reckoned from the new minimum, as llama.cpp does.
        best_iscale = torch.where(better, iscale, best_iscale)
        best_low = torch.where(better, low, best_low)
        best = torch.where(better, error, best)
        scale = torch.where(better, this_scale, scale)
        low = torch.where(better, this_low, low)
    searched = _nearest(best_iscale * (x - best_low)).clamp_(0, most)
    # A block of one value: no scale, and that value as the minimum.
    searched.masked_fill_(flat, 0)
    return scale.masked_fill_(flat, 0), -torch.where(flat, first_low, low), searched


def _error(q: Any, scale: Any, low: Any, x: Any, weights: Any) -> Any:
    off = scale * q
    off += low
    off -= x
    off *= off.clone()
    off *= weights
    return _sum(off)


def _packed_scales(scales: Any, minima: Any) -> Any:
    """Eight scales and eight minima of six bits in twelve bytes. Both (super-blocks, 8), uint8."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    return torch.cat(
        [
            s[:, :4] | s[:, 4:] >> 4 << 6,
            m[:, :4] | m[:, 4:] >> 4 << 6,
            s[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
        ],
        1,
    )


def _six_bits(largest: Any, each: Any) -> Any:
    """Each of a super-block's scales as a share of 63, float32 of whole numbers. largest: (n,), each: (n, 8)."""
    inverse = torch.where(largest > 0, _from(63, largest), 0)
    # A byte in llama.cpp, in which what is below 0 wraps around.
    return _nearest(inverse[:, None] * each).to(torch.int32).bitwise_and_(255).clamp_(max=63).float()


def _six(rows: Any) -> Any:
    """Blocks of 16 with a signed scale: x = d·scale·q, q from -32 to 31."""
    x = rows.reshape(-1, 16).t().contiguous()
    scale, searched = _search(x)
    scales = scale.view(-1, 16)
    largest = _of_largest(scales.t())
    iscale = _from(-128, largest)
    d = _from(1, iscale).half()
    eight = _nearest(iscale[:, None] * scales).clamp_(max=127)
    each_d = (d.float()[:, None] * eight).view(-1)
    q = _nearest(x / each_d).clamp_(-32, 31).add_(32)
    q = torch.where(each_d == 0, searched, q).to(torch.uint8)
    # Two halves of four runs of 32.
    q = q.t().reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    eight = eight.to(torch.int8).view(torch.uint8)
    found = torch.cat([ql.reshape(-1, 128), qh.reshape(-1, 64), eight, d[:, None].view(torch.uint8)], 1)
    return found.masked_fill_((largest.abs() < _NOTHING)[:, None], 0)


def _search(x: Any) -> tuple[Any, Any]:
    """Each block's scale, and the numbers from 0 to 63 that the search gave its weights. x: (16, blocks). Of
    llama.cpp's make_qx_quants, where a weight counts by its square."""
    largest = _of_largest(x)
    nothing = largest.abs() < _NOTHING
    squares = x * x
    cubes = squares * x
    best_iscale = _from(-32, largest)
    scale = best = None
    products = x.new_empty(2, *x.shape)
    for step in (0, *(each for each in range(-9, 10) if each)):
        iscale = _from(-(32 + _f32(0.1) * step), largest)
        q = _nearest(iscale * x).clamp_(-32, 31)
        torch.mul(cubes, q, out=products[0])
        torch.mul(squares, q, out=products[1])
        products[1] *= q
        sum_lx, sum_l2 = _sum(products.transpose(0, 1))
        if scale is None or best is None:
            scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0)
            best = scale * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        best_iscale = torch.where(better, iscale, best_iscale)
    assert scale is not None
    searched = _nearest(best_iscale * x).clamp_(-32, 31).add_(32)
    return scale.masked_fill(nothing, 0), searched.masked_fill_(nothing, 0)


# ---------------------------------------------------------------------- arithmetic


def _f32(number: float) -> Any:
    """A constant as C holds it, so that what is reckoned from it is rounded as there."""
    return torch.tensor(number, dtype=torch.float32)


def _from(number: Any, divisor: Any) -> Any:
    """number / divisor, divided: `number / tensor` would be number · (1 / tensor)."""
    return torch.full_like(divisor, float(number)) / divisor


def _over(values: Any, number: float) -> Any:
    """values / number, divided: by a number torch multiplies with its reciprocal on a GPU."""
    return values / torch.full_like(values, number)


def _nearest(values: Any) -> Any:
    """Halves to the even one, as adding 1.5 · 2²³ does in llama.cpp (nearest_int)."""
    return values.round_()


def _root(values: Any) -> Any:
    """The nearest number to each root. On a processor torch's own may be the one beside it."""
    return values.double().sqrt_().float()


def _sum(values: Any) -> Any:
    """Over the first axis, one after another."""
    total = values[0].clone()
    for each in values[1:]:
        total += each
    return total


def _of_largest(values: Any) -> Any:
    """Of each column the value that is furthest from 0, the first where there are several; 0 where all are."""
    found = torch.zeros_like(values[0])
    for each in values:
        found = torch.where(each.abs() > found.abs(), each, found)
    return found


_ENCODERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "q4_K": (_asymmetric(4, -1.0, 20), 144),
    "q5_K": (_asymmetric(5, -0.5, 15), 176),
    "q6_K": (_six, 210),
}
