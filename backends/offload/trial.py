"""A change that is tried for a few steps, the measurement that judges it, and what is remembered.

Steps differ: samplers of two evaluations end with one, cond and uncond come together or apart, a
cache leaves blocks out. So model calls are compared, and only those of steps that did equal work.
"""

from dataclasses import dataclass, field
from typing import Literal

from .config import OffloadConfig
from .measure import Measured

LONGEST_TRIAL = 3  # steps, before a change that could not be judged ends
Verdict = Literal[
    "kept", "undone", "not comparable", "too few steps", "kept before", "undone before"
]
Key = tuple[tuple[int, ...], OffloadConfig, str]  # latent shape, config, card


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step runs. resident_bytes: None leaves it to the widget; first_blocks: loaded first."""

    resident_bytes: int | None = None
    first_blocks: tuple[int, ...] = ()
    prefetches: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a run found: the setting to begin with, the step it predicts.

    tried: the setting that was tried to find out; is_rolled_back: it was undone, do not try it
    again; gain: what it saved, as a share of a model call.
    """

    setting: Setting
    predicted_step_seconds: float | None
    tried: Setting | None = None
    is_rolled_back: bool = False
    gain: float | None = None


@dataclass
class Memo:
    """What runs of one MODEL and its clones found. Numbers only."""

    decisions: dict[Key, Decision] = field(default_factory=dict)


@dataclass(kw_only=True)
class Trial:
    """A setting that came into force at `step`. previous: what to go back to; least_gain: share of
    a model call that it has to save, negative where it may cost something."""

    step: int
    previous: Setting
    least_gain: float
    baseline: Measured
    num_equal: int = 0  # steps under the setting that did the baseline's work

    def step_ended(self, measured: Measured | None) -> float | None:
        """What that step saved per model call; None if it did other work than the baseline, or was
        the first to do it under this setting: that one makes the buffers."""
        before = self.baseline
        if measured is None or measured is before or not before.work.is_whole:
            return None
        if measured.work != before.work:
            return None
        self.num_equal += 1
        if self.num_equal < 2:
            return None
        return 1.0 - measured.call_seconds / max(before.call_seconds, 1e-9)

    def is_over(self, step: int) -> bool:
        """Whether the steps up to `step` were enough to wait for."""
        return step - self.step >= LONGEST_TRIAL
