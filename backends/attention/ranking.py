"""Which of the kernels that can take a call are worth taking: by time, as far as it is known.

Nothing is preferred to a default of unknown speed, and an approximate kernel has to gain more than
an exact one.
"""

from collections.abc import Callable

import torch

from .. import host
from . import failures
from .config import AttentionConfig
from .entry import DEFAULT, Entry, Fallback, answer_of
from .kept import Kept
from .kernels.base import APPROXIMATE, EXACT, Kernel
from .layout import Views
from .request import Request
from .tuning import race, slice_heads

# The share of the default's time that a kernel must stay below to be used.
GAIN = {EXACT: 0.97, APPROXIMATE: 0.90}
TUNING = "Slipstream: timing attention kernels for this shape (once per GPU)"
TUNED = "Slipstream: attention kernels timed in {:.1f} s, kept for later runs"


class Ranking:
    """Times candidates where they are not known yet. num_calls: of attention in the whole run."""

    def __init__(self, config: AttentionConfig, kept: Kept, num_calls: int):
        self._config, self._kept, self._num_calls = config, kept, num_calls

    def rank(
        self,
        entry: Entry,
        approximate: list[Kernel],
        exact: list[Kernel],
        views: Views,
        fallback: Fallback,
    ) -> tuple[Kernel | None, list[Kernel]]:
        """(exact kernel or None for the default, approximate kernels that beat it, best first)."""
        if self._config.policy == "manual" or not self._config.autotune:
            return (exact[0] if exact else None), approximate
        times = self._times(entry, approximate, exact, views, fallback)
        default_ms = times.get(fallback.id)
        if default_ms is None:  # the default first: nothing can be said to beat an unknown
            return (None if fallback.may_stay or not exact else exact[0]), []
        best: Kernel | None = min(
            (k for k in exact if k.id in times), key=lambda k: times[k.id], default=None
        )
        if fallback.may_stay and (best is None or times[best.id] > GAIN[EXACT] * default_ms):
            if best is not None:
                entry.reasons[best.id] = _slower(best, times[best.id], DEFAULT, default_ms)
            best = None
        entry.exact_ms = times[best.id] if best is not None else default_ms
        faster = []
        name = best.id if best is not None else DEFAULT
        for kernel in sorted((k for k in approximate if k.id in times), key=lambda k: times[k.id]):
            if times[kernel.id] < GAIN[APPROXIMATE] * entry.exact_ms:
                faster.append(kernel)
            else:
                entry.reasons[kernel.id] = _slower(kernel, times[kernel.id], name, entry.exact_ms)
        return best, faster

    def _times(
        self,
        entry: Entry,
        approximate: list[Kernel],
        exact: list[Kernel],
        views: Views,
        fallback: Fallback,
    ) -> dict[str, float]:
        """Milliseconds of the default and of the candidates, as far as they are known or fit."""
        request, timings, budget = entry.request, self._kept.timings, self._kept.budget
        candidates = [*_worth_timing(exact, request), *approximate]
        calls: dict[str, Callable[[Views], object]] = {fallback.id: fallback.run}
        calls |= {kernel.id: _caller(kernel) for kernel in candidates}
        known = {n: ms for n in calls if (ms := timings.get(request, n)) is not None}
        if len(known) == len(calls):
            return known
        why = "while a CUDA graph is captured" if request.capturing else _no_room(views)
        if why is not None:
            entry.reasons.update({n: f"{n} is not timed: {why}" for n in calls if n not in known})
            return known
        host.show_text_on_running_node(TUNING)
        found = race(calls, request, views, timings, budget, host.raise_if_cancelled)
        host.show_text_on_running_node(TUNED.format(budget.spent_s))
        if fallback.id in found.ms:
            budget.expected_s = max(
                budget.expected_s, found.ms[fallback.id] * self._num_calls / 1e3
            )
        for name, error in found.dropped.items():
            if isinstance(error, torch.cuda.OutOfMemoryError):
                host.release_cached_memory()
            entry.reasons[name] = failures.sentence(name, error, "while it was timed")
        for name in found.open:
            entry.reasons[name] = (
                f"{name} is not timed yet: this run's {budget.spent_s:.1f} s for timing are used "
                "up; the next run goes on"
            )
        return found.ms


def _caller(kernel: Kernel) -> Callable[[Views], object]:
    return lambda views: answer_of(kernel, views)


def _worth_timing(exact: list[Kernel], request: Request) -> list[Kernel]:
    """Without a mask, torch's FlashAttention is always ahead of its memory-efficient kernel."""
    if request.has_mask or not any(k.id == "flash_sdpa" for k in exact):
        return exact
    return [k for k in exact if k.id != "efficient"]


def _slower(kernel: Kernel, ms: float, other: str, other_ms: float) -> str:
    """'sage2 is less than 10 % faster here (9.8 ms, default 10 ms)'."""
    percent = round(100 * (1 - GAIN[kernel.category]))
    what = "not faster" if ms >= other_ms else f"less than {percent} % faster"
    return f"{kernel.id} is {what} here ({ms:.3g} ms, {other} {other_ms:.3g} ms)"


def _no_room(views: Views) -> str | None:
    """Why results and quantised copies of the timed heads do not fit in device memory, or None."""
    if views.q.device.type != "cuda":
        return None
    free = host.free_memory(views.q.device)
    part, _ = slice_heads(views)
    needed = 3 * (part.q.nbytes + part.k.nbytes + part.v.nbytes)
    if free > needed:
        return None
    return f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed"
