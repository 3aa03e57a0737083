"""Timing candidates against each other: on a few heads, in turn, within a budget of seconds.

All of a long video's attention takes seconds a call on a small card, and the time is the same for
every head; so the candidates run on as many heads as fill a GPU, and what they take is scaled up.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .failures import must_raise
from .layout import Views
from .request import Request
from .timings import Timings

LEAST_S = 2.0  # a run may always spend this long on timing
SHARE = 0.02  # and this share of the attention that lies before it
_TILES = 512  # 128-row pieces of work that fill today's GPUs a few times over
_ROWS = 128
_REPEATS = 3
_LONG_MS = 100.0  # a call this long is timed once
_BATCH_MS, _MOST_IN_BATCH = 3.0, 5  # short calls follow each other, as they do in a model

Call = Callable[[Views], Any]


@dataclass
class Budget:
    """Seconds that one run may still spend on timing."""

    least_s: float = LEAST_S
    spent_s: float = 0.0
    expected_s: float = 0.0  # of attention in the whole run, as far as known

    @property
    def left_s(self) -> float:
        return max(self.least_s, SHARE * self.expected_s) - self.spent_s


@dataclass
class Race:
    """What became of one comparison. ms: of a full call; dropped: who failed; open: not timed."""

    ms: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, Exception] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)


def slice_heads(views: Views) -> tuple[Views, float]:
    """(the call on its first heads, how many times longer the whole call is)."""
    batch, heads, q_tokens, _ = views.q.shape
    kv_heads = views.k.shape[1]
    group = heads // kv_heads
    tiles_per_kv = batch * group * math.ceil(q_tokens / _ROWS)
    num_kv = min(kv_heads, math.ceil(_TILES / tiles_per_kv))
    if num_kv == kv_heads:
        return views, 1.0
    num = num_kv * group
    mask = views.mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, :num]
    part = Views(views.q[:, :num], views.k[:, :num_kv], views.v[:, :num_kv], mask, views.scale)
    return part, kv_heads / num_kv


def race(
    calls: Mapping[str, Call],
    request: Request,
    views: Views,
    timings: Timings,
    budget: Budget,
    interrupt: Callable[[], None],
) -> Race:
    """Times of all `calls` for this request: those known, and those measured now.

    A call that raises is dropped with its error. interrupt: raises if the user has cancelled;
    asked between any two calls. Whoever the budget does not reach is left open.
    """
    result = Race(ms={n: ms for n in calls if (ms := timings.get(request, n)) is not None})
    new = [name for name in calls if name not in result.ms]
    if not new:
        return result
    started = time.perf_counter()
    part, factor = slice_heads(views)
    samples: dict[str, list[float]] = {}

    def run(name: str, num: int) -> None:
        interrupt()
        try:
            if name not in samples:
                calls[name](part)  # compiles, allocates
            ms = _timed(lambda: calls[name](part), num, part.q.device)
        except Exception as error:
            if must_raise(error):
                raise
            result.dropped[name] = error
            samples.pop(name, None)
        else:
            samples.setdefault(name, []).append(ms)

    for name in new:
        if time.perf_counter() - started > budget.left_s:
            result.open.append(name)
        else:
            run(name, 1)
    for _ in range(_REPEATS - 1):
        for name in list(samples):
            ms = min(samples[name])
            if ms <= _LONG_MS and time.perf_counter() - started <= budget.left_s:
                run(name, max(1, min(_MOST_IN_BATCH, int(_BATCH_MS / ms))))
    for name, found in samples.items():
        result.ms[name] = min(found) * factor
        timings.put(request, name, result.ms[name])
    budget.spent_s += time.perf_counter() - started
    return result


def _timed(call: Callable[[], Any], num: int, device: torch.device) -> float:
    """Milliseconds of one of `num` calls in a row, by the device's clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in itertools.repeat(None, num):
            call()
        return max((time.perf_counter() - started) * 1e3 / num, 1e-6)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in itertools.repeat(None, num):
            call()
        end.record()
        end.synchronize()
    return max(float(begin.elapsed_time(end)) / num, 1e-6)
