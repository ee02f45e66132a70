"""Sequences of different lengths in one forward pass without padding: whatever looks at one token at a time sees them
end to end, and the layers that look back see each sequence alone. Needs torch: import it in a job's process only.

Padding wastes more than half of a batch of short chats: 32 of the k0 corpus hold 3,700 tokens and fill 32 × 270 = 8,600
places. Attention still works on such a padded view, made and undone around it: right padding is exact under a causal
layer, so no kernel has to know of boundaries, and in Qwen3.5 it is a hundredth of the arithmetic."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from katherine.fit import CHUNK, Multiples

# The name under which transformers finds our attention.
ATTENTION = "katherine_packed"


class Size(NamedTuple):
    """What a captured graph's sizes depend on: tokens with filler, rows and their width in the padded view, chunks."""

    tokens: int
    rows: int
    width: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows end to end, and where each token stands in the padded view of rows × width places. All int64.

    ids, positions, place: (tokens,). place: of each token in the padded view. spread: (rows × width,), the token at
    each place; padding repeats token 0, which no token looks at. bounds: (sequences + 1,), where each sequence begins
    in ids, and the last ends. chunks: (chunks, 2), the sequence of each chunk and its number in there. scored:
    (scored,), tokens whose next one is learned. labels: (scored,), those next ones. owner: (scored,), the row of each.
    filled: rows that are not empty. filler: tokens at the end that stand for nothing, a sequence of their own.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    place: torch.Tensor
    spread: torch.Tensor
    bounds: torch.Tensor
    chunks: torch.Tensor
    scored: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    rows: int
    width: int
    filled: int
    filler: int

    @property
    def tokens(self) -> int:
        """Without the filler."""
        return len(self.ids) - self.filler

    @property
    def size(self) -> Size:
        return Size(len(self.ids), self.rows, self.width, len(self.chunks))

    def to(self, device: Any) -> "Batch":
        kept = ((field.name, getattr(self, field.name)) for field in fields(self))
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in kept if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


AS_THEY_ARE = Multiples()


def pack(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    multiples: Multiples = AS_THEY_ARE,
    known: Collection[Size] = (),
) -> Batch:
    """Rows of (ids, learned) as one batch; rows that are added are empty. known: sizes that cost less than a new one.
    Raises ValueError for an empty row."""
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    if not len(rows) or not lengths.all():
        raise ValueError("pack was given no rows, or an empty one.")
    size = _size(lengths, multiples, known)
    count, width = size.rows, size.width
    tokens = int(lengths.sum())
    filler = size.tokens - tokens
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    positions = torch.arange(tokens) - (lengths.cumsum(0) - lengths)[owner]
    place = owner * width + positions
    spread = torch.zeros(count * width, dtype=torch.int64)
    spread[place] = torch.arange(tokens)
    ids = torch.tensor([token for row, _ in rows for token in row])
    learned = torch.tensor([bool(on) for _, row in rows for on in row])
    # A row's first token is predicted from nothing.
    next_learned = (learned & (positions > 0)).nonzero().squeeze(1)
    # One sequence for the filler, which may be empty, and one that always is, for the chunks that are added.
    sequences = functional.pad(lengths, (0, count - len(rows) + 2))
    sequences[count] = filler
    padding = (0, filler)
    return Batch(
        ids=functional.pad(ids, padding),
        positions=functional.pad(positions, padding),
        place=functional.pad(place, padding, value=count * width - 1),
        spread=spread,
        bounds=functional.pad(sequences.cumsum(0), (1, 0)),
        chunks=_chunks(sequences, size.chunks),
        scored=next_learned - 1,
        labels=ids[next_learned],
        owner=owner[next_learned],
        rows=count,
        width=width,
        filled=len(rows),
        filler=filler,
    )


def _size(lengths: torch.Tensor, multiples: Multiples, known: Collection[Size]) -> Size:
    """The least of the known sizes that holds rows of these lengths, if its tokens are at most one multiple more than
    need be; else a new one."""
    tokens, rows = _up(int(lengths.sum()), multiples.tokens), _up(len(lengths), multiples.rows)
    least = _least(lengths, tokens, rows)
    new = Size(tokens, rows, _up(least.width, multiples.width), _up(least.chunks, multiples.chunks))
    enough = (
        each
        for each in known
        if tokens <= each.tokens <= tokens + multiples.tokens
        and rows <= each.rows
        and all(a <= b for a, b in zip(_least(lengths, each.tokens, each.rows), each, strict=True))
    )
    return min(enough, default=new)


def _least(lengths: torch.Tensor, tokens: int, rows: int) -> Size:
    """The narrowest of so many tokens and rows."""
    filler = tokens - int(lengths.sum())
    # Filler stands at the last place, which must then be nobody's.
    width = int(lengths.max()) + (filler > 0 and rows == len(lengths))
    return Size(tokens, rows, width, sum(-(-length // CHUNK) for length in [*lengths.tolist(), filler]))


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple


def _chunks(sequences: torch.Tensor, wanted: int) -> torch.Tensor:
    counts = (sequences + CHUNK - 1) // CHUNK
    owner = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    number = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    empty = torch.tensor([[len(sequences) - 1, 0]]).expand(wanted - len(owner), 2)
    return torch.cat([torch.stack([owner, number], dim=1), empty])


# ------------------------------------------------------------------------------------- the padded view and back


class _Spread(torch.autograd.Function):
    """(tokens, features) → (places, features). Each token has one place of its own, and the gradient of what repeats
    at padding is zero, so that backward is a look-up too: no atomics, the same sums every time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spread: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


class _Gather(torch.autograd.Function):
    """(places, features) → (tokens, features)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.places = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (place,) = ctx.saved_tensors
        # Filler, which shares a place, has no gradient: nothing reads what becomes of it.
        found = gradient.new_zeros(ctx.places, gradient.shape[1])
        return found.index_copy_(0, place, gradient), None


def spread(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(tokens, features) → (rows, width, features)."""
    return _Spread.apply(x, batch.spread, batch.place).view(batch.rows, batch.width, -1)


def gather(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(rows, width, features) → (tokens, features)."""
    return _Gather.apply(x.reshape(batch.rows * batch.width, -1), batch.place)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Batch | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, heads, tokens, size) → (1, tokens, heads, size)."""
    assert packed is not None and attention_mask is None, "packed attention was called without a packed batch"

    def rows(x: torch.Tensor) -> torch.Tensor:
        heads, tokens, size = x.shape[1:]
        flat = x[0].transpose(0, 1).reshape(tokens, heads * size)
        return spread(flat, packed).view(packed.rows, packed.width, heads, size).transpose(1, 2)

    heads, tokens, size = query.shape[1:]
    found = functional.scaled_dot_product_attention(
        rows(query),
        rows(key),
        rows(value),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=key.shape[1] != heads,
    )
    return gather(found.transpose(1, 2).flatten(2), packed).view(1, tokens, heads, size), None
