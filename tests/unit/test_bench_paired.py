"""Paired ratios, the noise band, verdicts, comparisons of two files, discordant pairs."""

import pytest
from slipstream.bench import compare
from slipstream.bench.paired import (
    FASTER,
    NOISE,
    SLOWER,
    noise_band,
    ratio,
    take_turns,
    verdict,
    verdict_of,
)
from slipstream.bench.scores import discordant_p


def test_sides_take_turns_and_every_second_round_runs_backwards():
    order = []

    def side(name):
        return lambda number: order.append((number, name)) or 1.0

    seconds = take_turns({name: side(name) for name in "ABC"}, 2)
    assert order == [(0, "A"), (0, "B"), (0, "C"), (1, "C"), (1, "B"), (1, "A")]
    assert seconds == {"A": [1.0, 1.0], "B": [1.0, 1.0], "C": [1.0, 1.0]}


def test_interrupting_keeps_the_complete_rounds():
    def stops(number):
        if number == 2:
            raise KeyboardInterrupt
        return 2.0

    seconds = take_turns({"A": lambda number: 1.0, "B": stops}, 5)
    assert seconds == {"A": [1.0, 1.0], "B": [2.0, 2.0]}


def test_interrupting_before_the_first_round_is_not_hidden():
    def stops(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"A": stops}, 5)


def test_a_ratio_is_the_median_of_pairs_not_of_sides():
    slow_then_fast = [10.0, 1.0, 10.0]
    found = ratio(slow_then_fast, [5.0, 0.5, 5.0])
    assert (found.median, found.low, found.high, found.num_pairs) == (2.0, 2.0, 2.0, 3)


def test_no_pairs_is_a_sentence():
    with pytest.raises(ValueError, match="no round was completed"):
        ratio([], [])


@pytest.mark.parametrize(
    ("again", "median", "expected"),
    [
        ([1.0, 1.0, 1.0], 1.2, FASTER),
        ([1.0, 1.0, 1.0], 0.8, SLOWER),
        ([0.8, 1.0, 1.4], 1.1, NOISE),
        ([0.8, 1.0, 1.4], 0.9, NOISE),  # the band reaches as far to either side
        ([1.0, 1.0, 1.0, 0.8], 1.2, NOISE),  # few pairs: extremes
        ([1.0] * 9 + [0.8], 1.2, FASTER),  # many: quartiles
    ],
)
def test_verdict_against_the_noise(again, median, expected):
    band = noise_band(ratio([1.0] * len(again), again))
    assert verdict(median, band) == expected


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ([0.8, 0.8, 0.9], FASTER),
        ([1.3, 1.2, 1.2], SLOWER),
        ([0.5, 2.0, 2.5, 0.8], NOISE),  # a median outside the band, quartiles around 1
        ([0.98, 0.98, 0.99], NOISE),  # all on one side, inside the band
    ],
)
def test_a_series_on_both_sides_of_1_is_noise(side, expected):
    band = (0.97, 1.03)
    assert verdict_of(ratio([1.0] * len(side), side), band) == expected


def suite(median, spread=0.01, noise=0.02):
    speed = {"median": median, "low": median - spread, "high": median + spread}
    sides = [
        {"name": "plain", "verdict": "baseline", "speed": speed},
        {"name": "cache", "verdict": "faster", "speed": speed},
    ]
    band = [1 - noise, 1 + noise]
    return {"subjects": [{"name": "flux", "noise_band": band, "sides": sides}]}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (suite(1.5), suite(1.8), FASTER),
        (suite(1.5), suite(1.2), SLOWER),
        (suite(1.5), suite(1.52), NOISE),
        (suite(1.5, spread=0.3), suite(1.8, spread=0.3), NOISE),
        (suite(1.5, noise=0.3), suite(1.8), NOISE),
    ],
)
def test_compare_two_files(before, after, expected):
    rows = compare.compare(before, after)
    assert [(row[0], row[1], row[-1]) for row in rows] == [("flux", "cache", expected)]


def test_a_side_of_one_file_only_is_listed():
    empty = {"subjects": []}
    assert compare.compare(suite(1.5), empty)[0][-1] == compare.ABSENT


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 9, 22 / 1024)]
)
def test_discordant_pairs(one, other, expected):
    assert discordant_p(one, other) == pytest.approx(expected)
    assert discordant_p(other, one) == pytest.approx(expected)
