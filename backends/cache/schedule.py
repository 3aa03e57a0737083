"""Which steps may reuse, from warmup, cooldown and a compute mask. Pure: no torch, no state.

A step is computed, reused, or the engine is asked. Everything counts steps (sigmas), so a sampler
with two evaluations per step gets the same verdict for both. 1 in a mask means compute.
"""

import math
from dataclasses import dataclass
from functools import cached_property

COMPUTE, REUSE, ASK = "compute", "reuse", "ask"

# Computed steps of 28, and how many of them come first (cache-dit 1.5.3, cache_interface.py,
# steps_mask). The spread over other step counts is ours.
SCM_SHARES = {"slow": (18, 8), "medium": (15, 6), "fast": (11, 6), "ultra": (8, 4)}
_SCM_STEPS = 28


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The verdicts of one run.

    warmup, cooldown: first and last steps that are computed; warmup_interval: within the warmup
    only every n-th step must be; mask: per step, 1 = compute, or None; static: a 0 in the mask
    reuses without asking.
    """

    num_steps: int
    warmup: int = 0
    cooldown: int = 1
    warmup_interval: int = 1
    mask: tuple[int, ...] | None = None
    static: bool = False

    def verdict(self, step: int) -> str:
        """COMPUTE, REUSE or ASK for a step (0-based)."""
        if step >= self.num_steps - self.cooldown:
            return COMPUTE
        if step < self.warmup and step % self.warmup_interval == 0:
            return COMPUTE
        if self.mask is None:
            return ASK
        if self.mask[min(step, len(self.mask) - 1)]:
            return COMPUTE
        return REUSE if self.static else ASK

    def reason(self, step: int) -> str:
        """The word for a COMPUTE verdict: warmup, cooldown or mask."""
        if step >= self.num_steps - self.cooldown:
            return "cooldown"
        return "warmup" if step < self.warmup else "mask"

    @cached_property
    def num_open(self) -> int:
        """Steps that may reuse."""
        return sum(self.verdict(step) != COMPUTE for step in range(self.num_steps))

    @cached_property
    def num_asked(self) -> int:
        """Steps whose decision takes a comparison."""
        return sum(self.verdict(step) == ASK for step in range(self.num_steps))


def make_mask(num_steps: int, share: float, *, dense: int | None = None) -> tuple[int, ...]:
    """A mask that computes about `share` of the steps: densely first, then evenly, the last too.

    dense: computed steps before the first zero, by default half of all computed ones. Runs of 8
    steps or fewer compute more than half, since every one of their steps is a long way.
    """
    num_computed = math.ceil(share * num_steps - 1e-9)
    if num_steps <= 8:
        num_computed = max(num_computed, num_steps // 2 + 1)
    num_computed = min(max(num_computed, min(2, num_steps)), num_steps)
    dense = math.ceil(num_computed / 2) if dense is None else dense
    dense = min(max(dense, 1), max(num_computed - 1, 1))
    mask = [0] * num_steps
    mask[:dense] = [1] * min(dense, num_steps)
    rest = num_computed - dense
    for i in range(1, rest + 1):
        mask[dense - 1 + round(i * (num_steps - dense) / rest)] = 1
    return tuple(mask)


def named_mask(name: str, num_steps: int) -> tuple[int, ...]:
    """The mask of a policy of SCM_SHARES, for any number of steps."""
    computed, first = SCM_SHARES[name]
    dense = max(1, round(first / _SCM_STEPS * num_steps))
    return make_mask(num_steps, computed / _SCM_STEPS, dense=dense)


def parse_counts(text: str) -> tuple[int, ...]:
    """ "6,1,3,1" -> (6, 1, 3, 1): computed, reused, computed, ... Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"scm is '{text}': choose off, slow, medium, fast or ultra, or give alternating counts "
            "of computed and reused steps such as 6,1,3,2,1"
        )
    return tuple(int(part) for part in parts)


def counts_mask(counts: tuple[int, ...], num_steps: int) -> tuple[int, ...]:
    """The mask of alternating computed and reused counts. Raises ValueError on a wrong sum."""
    if sum(counts) != num_steps:
        raise ValueError(f"scm counts add up to {sum(counts)}, the run has {num_steps} steps.")
    mask: list[int] = []
    for index, count in enumerate(counts):
        mask.extend([1 - index % 2] * count)
    return tuple(mask)
