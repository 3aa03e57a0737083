"""TaylorSeer's extrapolation of a residual (arXiv 2503.06923), in cache-dit 1.5.3's arithmetic.

Differences of the computed residuals, divided by the evaluations between them, stand for the
derivatives. Coordinates are call counts per key, so they rise strictly whatever the sampler does.
"""

import math

import torch


class TaylorSeries:
    """One stream of one key: the last computed value and up to `order` differences of it."""

    def __init__(self, order: int):
        self._order = order
        self._terms: list[torch.Tensor] = []
        self._now = self._computed_at = -1

    def begin(self) -> None:
        """One more call of this key."""
        self._now += 1

    def update(self, value: torch.Tensor) -> None:
        """A computed value at the current call."""
        if self._terms and self._terms[0].shape != value.shape:
            self._terms, self._now, self._computed_at = [], -1, -1
        gap = self._now - self._computed_at
        terms = [value]
        # cache-dit takes no differences before its third call after the first value
        if self._now > 1:
            for previous in self._terms[: self._order]:
                terms.append((terms[-1] - previous) / gap)
        self._terms, self._computed_at = terms, self._now

    def predict(self) -> torch.Tensor:
        """The value expected at the current call."""
        elapsed = self._now - self._computed_at
        out = self._terms[0]
        for i, term in enumerate(self._terms[1:], start=1):
            out = out + (1 / math.factorial(i)) * term * elapsed**i
        return out

    @property
    def latest(self) -> torch.Tensor:
        """The last computed value."""
        return self._terms[0]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._terms)
