"""The formulas, against figures that were published or can be counted by hand."""

import pytest

from katherine import statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(successes, trials, low, high):
    assert statistics.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_an_interval_never_leaves_what_a_rate_can_be_and_says_nothing_of_nothing():
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    for trials in range(1, 40):
        for successes in range(trials + 1):
            low, high = statistics.wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
            of_failures = statistics.wilson(trials - successes, trials)
            assert (low, high) == pytest.approx((1 - of_failures[1], 1 - of_failures[0]))


def test_more_questions_make_it_narrower():
    widths = [high - low for low, high in (statistics.wilson(9 * n, 10 * n) for n in (1, 3, 10, 100))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("only_first", "only_second", "chance"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 32),
        (6, 0, 2 / 64),
        # Of 2^10 ways, 1 + 10 are as one-sided to this side.
        (1, 9, 22 / 1024),
        # Of 2^12: 1 + 12 + 66.
        (10, 2, 2 * 79 / 4096),
    ],
)
def test_mcnemar_counts_the_ways_in_which_chance_is_as_one_sided(only_first, only_second, chance):
    assert statistics.mcnemar(only_first, only_second) == pytest.approx(chance)
    assert statistics.mcnemar(only_second, only_first) == pytest.approx(chance)


def test_a_thousand_questions_are_no_trouble():
    assert statistics.mcnemar(1000, 0) == pytest.approx(2 / 2**1000)
    assert statistics.mcnemar(520, 480) == pytest.approx(0.2174, abs=1e-3)


def test_several_tests_are_believed_later_than_one():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([0.2]) == [0.2] and statistics.holm([]) == []


def test_impossible_counts_are_refused():
    for wrong in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            statistics.wilson(*wrong)
    with pytest.raises(ValueError):
        statistics.mcnemar(-1, 2)


def test_a_p_is_said_in_plain_words():
    said = [statistics.in_words(chance) for chance in (1.0, 0.05, 0.049, 0.009, 0.0001)]
    assert [each.split(" (")[0] for each in said] == [
        "may be chance", "may be chance", "probably not chance", "hardly chance", "hardly chance",
    ]  # fmt: skip
    assert said[-1].endswith("(p under 0.001)")
