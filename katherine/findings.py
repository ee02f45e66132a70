"""What only shows when a whole dataset is looked at: pairs that contradict each other, a bias to length, and the
spread of token counts. Pure figures; finding the lines and wording the report is corpus's work."""

import math
from collections.abc import Iterable, Sequence

import msgspec

# Choosing the longer reply would then be right twice as often as wrong: an easier lesson than any other in the data,
# and DPO learns it, since its reward is a sum over tokens.
LENGTH_BIAS_SHARE = 2 / 3
# Standard errors from an even split. In pairs without a bias this is exceeded once in 370 datasets, and fewer than
# ten pairs never exceed it.
LENGTH_BIAS_ERRORS = 3.0


class Contradictions(msgspec.Struct, frozen=True):
    """Rows of pairs under the same prompt, each with one row that contradicts it.

    swapped: chosen and rejected change places. at_odds: the reply chosen in one is rejected in the other.
    """

    swapped: dict[int, int]
    at_odds: dict[int, int]


def contradictions(sides: Sequence[tuple[bytes, bytes]]) -> Contradictions:
    """`sides`: for each pair the digests of (prompt, chosen) and of (prompt, rejected). Linear in the pairs."""
    row_of = {pair: row for row, pair in enumerate(sides)}
    swapped = {
        row: row_of[rejected, chosen] for row, (chosen, rejected) in enumerate(sides) if (rejected, chosen) in row_of
    }
    chooses: dict[bytes, int] = {}
    rejects: dict[bytes, int] = {}
    for row, (chosen, rejected) in enumerate(sides):
        if row not in swapped:
            chooses.setdefault(chosen, row)
            rejects.setdefault(rejected, row)
    at_odds = {}
    for row, (chosen, rejected) in enumerate(sides):
        if row not in swapped:
            other = rejects.get(chosen, chooses.get(rejected))
            if other is not None:
                at_odds[row] = other
    return Contradictions(swapped, at_odds)


class Lengths(msgspec.Struct):
    """Lengths in characters over preference pairs; a tie counts half on each side."""

    pairs: int = 0
    chosen: int = 0
    rejected: int = 0
    chosen_longer: float = 0.0

    def add(self, chosen: str, rejected: str) -> None:
        self.pairs += 1
        self.chosen += len(chosen)
        self.rejected += len(rejected)
        self.chosen_longer += 0.5 if len(chosen) == len(rejected) else float(len(chosen) > len(rejected))

    def figures(self) -> dict[str, float | bool] | None:
        """Mean lengths, their ratio, the share of pairs whose chosen reply is longer; None without pairs."""
        if not self.pairs:
            return None
        share = self.chosen_longer / self.pairs
        standard_error = 0.5 / math.sqrt(self.pairs)
        return {
            "chosen_mean": round(self.chosen / self.pairs, 1),
            "rejected_mean": round(self.rejected / self.pairs, 1),
            "ratio": round(self.chosen / self.rejected, 3),
            "chosen_longer_share": round(share, 3),
            "biased": max(share, 1 - share) >= LENGTH_BIAS_SHARE
            and abs(share - 0.5) > LENGTH_BIAS_ERRORS * standard_error,
        }


def spread(counts: Iterable[int], max_length: int) -> dict[str, int] | None:
    """Percentiles by nearest rank, and how many exceed max_length (tokens); None without counts."""
    ordered = sorted(counts)
    if not ordered:
        return None
    figures = {f"p{p}": ordered[math.ceil(len(ordered) * p / 100) - 1] for p in (50, 90, 99)}
    return figures | {"max": ordered[-1], "over_max_length": sum(count > max_length for count in ordered)}
