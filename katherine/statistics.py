"""How far a handful of yes and no carries: an interval for a rate, and whether two columns differ by more than chance.
Knows nothing of probes; each function names the paper it follows."""

import math
from collections.abc import Sequence

# The 97.5th percentile of the normal distribution: 95% of it lie within.
Z_95 = 1.959963984540054


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval for a rate: (low, high), each from 0 to 1; (0, 1) where nothing was tried.

    Wilson, E. B. (1927), JASA 22, 209-212. It never leaves 0 to 1, and holds for small counts and for rates of 0 and 1
    where the usual ± does not: Newcombe (1998), Statistics in Medicine 17, 857-872, method 3.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    middle = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    whole = 1 + z * z / trials
    # At the ends the formula gives 0 and 1, but for the last bit.
    low = 0.0 if successes == 0 else (middle - spread) / whole
    high = 1.0 if successes == trials else (middle + spread) / whole
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """p, two-sided and exact, that two columns asked the same questions differ so much by chance. only_first:
    questions that the first passed and the second failed; only_second: the other way round. Those that both passed or
    both failed say nothing of the difference.

    McNemar, Q. (1947), Psychometrika 12, 153-157, with the binomial distribution in place of his approximation, which
    needs more than 25 such questions.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first}, {only_second}")
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    # Whole numbers until here: 2 to the power of a thousand questions is no float.
    return min(1.0, 2 * tail / 2**count)


def holm(chances: Sequence[float]) -> list[float]:
    """The p of several tests, each raised so that the smallest of all is still believed by the same limit; in the order
    given. Holm, S. (1979), Scandinavian Journal of Statistics 6, 65-70."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    raised = [0.0] * len(chances)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[index]))
        raised[index] = highest
    return raised


def in_words(chance: float) -> str:
    """A p in plain words: "may be chance (p 0.25)", "hardly chance (p 0.002)". 0.05 is the usual limit, and no more
    than a custom."""
    figure = "p under 0.001" if chance < 0.001 else f"p {chance:.2g}"
    if chance >= 0.05:
        return f"may be chance ({figure})"
    return f"probably not chance ({figure})" if chance >= 0.01 else f"hardly chance ({figure})"
