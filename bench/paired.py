"""Paired timings: sides take turns in one process, and a ratio is a median of paired ratios.

What the machine does beside us changes over seconds, so a side is compared only to the baseline of
the same round. The baseline runs twice in a round: its ratio to itself is the noise, and a ratio
inside the noise is reported as such. Ratios are baseline time over side time: above 1 is faster.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..backends.frame_room import with_room

BASELINE, AGAIN = "plain", "plain again"
_FEW_PAIRS = 8
FASTER, SLOWER, NOISE = "faster", "slower", "within noise"


@dataclass(frozen=True)
class Ratio:
    """Median, quartiles and extremes of paired ratios."""

    median: float
    low: float
    high: float
    num_pairs: int
    least: float
    most: float

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def take_turns(
    sides: Mapping[str, Callable[[int], float]],
    num_rounds: int,
    *,
    on_run: Callable[[], None] = lambda: None,
    ends: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each side, round by round; every second round runs the sides backwards.

    sides: name -> what runs it once, given the round's number, and returns its seconds. Ctrl-C
    ends the rounds early: the rounds that are complete are returned. So does `ends`, of
    time.monotonic(): after the first, no round begins that would not be over by then.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    started = time.monotonic()
    try:
        for number in range(num_rounds):
            now = time.monotonic()
            if number and now + (now - started) / number > ends:
                break
            names = list(sides) if number % 2 == 0 else list(sides)[::-1]
            found = {}
            for name in names:
                found[name] = with_room(partial(sides[name], number))
                on_run()
            for name, value in found.items():
                seconds[name].append(value)
    except KeyboardInterrupt:
        if not any(seconds.values()):
            raise
    return seconds


def ratio(baseline: Sequence[float], side: Sequence[float]) -> Ratio:
    """How many times as fast the side is. Raises ValueError without a complete pair."""
    pairs = [a / b for a, b in zip(baseline, side, strict=True)]
    if not pairs:
        raise ValueError("no round was completed: nothing can be compared")
    median = statistics.median(pairs)
    if len(pairs) < 2:
        return Ratio(median, median, median, 1, median, median)
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(median, low, high, len(pairs), min(pairs), max(pairs))


def noise_band(again: Ratio) -> tuple[float, float]:
    """(low, high) around 1, as wide as the baseline differs from itself.

    By its quartiles; by its extremes below 8 pairs, whose quartiles are luck.
    """
    few = again.num_pairs < _FEW_PAIRS
    low, high = (again.least, again.most) if few else (again.low, again.high)
    reach = max(1 - low, high - 1, 0.0)
    return 1 - reach, 1 + reach


def verdict(median: float, band: tuple[float, float]) -> str:
    """The sentence's last word: faster, slower or within noise."""
    if band[0] <= median <= band[1]:
        return NOISE
    return FASTER if median > 1 else SLOWER


def verdict_of(speed: Ratio, band: tuple[float, float]) -> str:
    """The same of a whole series: quartiles on both sides of 1 are noise too."""
    return NOISE if speed.low <= 1 <= speed.high else verdict(speed.median, band)
