"""What only shows when a whole dataset is looked at: pairs that contradict each other, a bias to length, the spread of
token counts, and which problems are of one kind. Pure figures; finding the lines and wording the report is corpus's."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

# Choosing the longer reply would then be right twice as often as wrong: an easier lesson than any other in the data,
# and DPO learns it, since its reward is a sum over tokens.
LENGTH_BIAS_SHARE = 2 / 3
# Standard errors from an even split. In pairs without a bias this is exceeded once in 370 datasets, and fewer than
# ten pairs never exceed it.
LENGTH_BIAS_ERRORS = 3.0

# Bars up to the 99th percentile: fewer hide the shape, more are thinner than a screen's pixels once the axis runs on
# to a max length of four times that (the recipes' own).
BARS = 50
# Bars in all: what lies beyond twice the 99th percentile is counted together, so that one long row does not flatten
# all others.
MOST_BARS = 2 * BARS

# What differs between lines with one and the same problem: the turn it is in, another line's place, quoted names and
# numbers, and the explanation after the first colon or semicolon.
_PLACE = re.compile(r"^(?:(?:`\w+`|turn \d+): )+")
_TOO_LONG = re.compile(r"^[\d,]+ tokens; training takes up to .*", re.DOTALL)
_OTHER_LINE = re.compile(r" (in|of) .+, line \d+.*", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"\b\d[\d,]*\b")


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


def histogram(counts: Sequence[int]) -> dict[str, Any] | None:
    """Token counts in bars of one width: {"width": w, "counts": [rows of 0 to w-1, of w to 2w-1, ...], "beyond": rows
    longer than the last bar}. The width is 1, 2 or 5 times a power of ten. None without counts."""
    ordered = sorted(counts)
    if not ordered:
        return None
    p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
    width = _round_up(max(1, p99 / BARS))
    bars = [0] * min(MOST_BARS, ordered[-1] // width + 1)
    beyond = 0
    for count in ordered:
        if count // width < len(bars):
            bars[count // width] += 1
        else:
            beyond += 1
    return {"width": width, "counts": bars, "beyond": beyond}


def _round_up(least: float) -> int:
    power = 10 ** math.floor(math.log10(least))
    return next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= least)


def group(reason: str) -> str:
    """What a problem's reason has in common with others of its kind, for counting them together."""
    text = _PLACE.sub("", reason)
    text = _TOO_LONG.sub("longer than the max length", text)
    text = _OTHER_LINE.sub(r" \1 another line", text)
    text = re.split(r": |; | \(and in ", _QUOTED.sub("…", text), maxsplit=1)[0]
    return _NUMBER.sub("…", text)
