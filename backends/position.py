"""Where the steps of one run lie in the whole schedule, of which a sampler may do only a part.

KSamplerAdvanced splits a schedule over two samplers (Wan 2.2: a high and a low noise model), and
image to image begins in its middle. Both show in the sigmas: each has its percent of the model's
schedule, 0 at the highest sigma and 1 at none (ComfyUI's percent_to_sigma, backwards).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_HALVINGS = 40  # of the percent range: far below the width of a step
# Some schedulers leave out the first step of the range (ddim_uniform) and are whole all the same.
_LEFT_OUT = 1.25
# Schedulers with uneven steps (karras) make the other part look longer than it can be.
_MOST_TIMES = 3


@dataclass(frozen=True)
class Position:
    """A run's steps within the whole schedule. before, after: steps that this run does not do."""

    before: int
    num_steps: int
    after: int = 0

    @property
    def whole(self) -> int:
        """Steps of the whole schedule, as far as it can be told from the part."""
        return self.before + self.num_steps + self.after

    def from_start(self, step: int) -> int:
        """Steps of the whole schedule in front of this run's `step`."""
        return self.before + step

    def from_end(self, step: int) -> int:
        """Steps of the whole schedule behind this run's `step`."""
        return self.whole - 1 - self.from_start(step)


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The percent of the schedule at which it reaches `sigma`, which falls from 0 to 1."""
    if sigma <= 0.0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(percent_to_sigma(middle)) > sigma * (1 + 1e-6):
            low = middle
        else:
            high = middle
    return high


def position_of(
    sigmas: Sequence[float], percent_to_sigma: Callable[[float], float] | None
) -> Position:
    """Where a run over `sigmas` lies; the whole schedule if the model cannot say.

    The steps of the other parts are taken to be as wide, in percent, as this run's are.
    """
    num_steps = max(len(sigmas) - 1, 0)
    if not num_steps or percent_to_sigma is None:
        return Position(0, num_steps)
    first, last = (percent_of(sigma, percent_to_sigma) for sigma in (sigmas[0], sigmas[-1]))
    width = (last - first) / num_steps
    if width <= 0:  # sigmas that rise: an inverse sampler has no first or last step to protect
        return Position(0, num_steps)
    most = _MOST_TIMES * num_steps
    before = 0 if first <= _LEFT_OUT * width else min(round(first / width), most)
    return Position(before, num_steps, min(round((1.0 - last) / width), most))
