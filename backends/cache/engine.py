"""What decides and remembers for a block cache: the protocol all engines keep, and their rules.

An engine sees one key per branch. Per evaluation and key: `begin`, then `ask` if the schedule
leaves it open, then `settle` with what will be done and `observe` with the metric, if there is one;
a computed call ends with `store`, a reused one takes `predict`. The rules are those of cache-dit
1.5.3 (CachedContextManager.can_cache).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from .config import CacheConfig

Streams = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Answer:
    """reuse or not; diff: the change that was compared, None if none was; reason: why."""

    reuse: bool
    diff: float | None
    reason: str


class Engine(Protocol):
    """Decisions and stored residuals of one run. Not thread-safe: the caller holds a lock."""

    label: str  # "builtin", "cache-dit 1.5.3"
    needs_metric: bool  # False: decides without comparing anything

    def begin(self, key: Hashable, evaluation: int) -> None:
        """A model call of this key starts; evaluation indices only rise."""

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        """Whether the metric has changed little enough; never reuses without one if it needs it."""

    def settle(self, key: Hashable, reuse: bool) -> None:
        """What will be done in this call."""

    def observe(self, key: Hashable, reuse: bool, metric: torch.Tensor) -> None:
        """The metric of a settled call; the engine keeps it if later calls compare with it."""

    def store(self, key: Hashable, residual: Streams) -> None:
        """Keep what the middle blocks added; the engine owns these tensors."""

    def predict(self, key: Hashable, extrapolate: bool) -> Streams:
        """The residual for this evaluation: extrapolated if the calibrator may, else the last."""

    def drop(self, key: Hashable) -> None:
        """Forget a key."""

    def nbytes(self) -> int: ...

    def close(self) -> None: ...


def relative_change(previous: torch.Tensor, current: torch.Tensor) -> float:
    """mean|previous - current| / mean|previous|, in the tensors' dtype. Waits for the device."""
    return ((previous - current).abs().mean() / previous.abs().mean()).item()


def limit_reached(
    config: CacheConfig, *, num_cached: int, streak: int, accumulated: float
) -> str | None:
    """The limit that forbids reuse now, in the order cache-dit checks them, or None."""
    if 0 <= config.max_cached_steps <= num_cached:
        return "max_cached"
    if 0 <= config.max_continuous_cached_steps <= streak:
        return "max_continuous"
    if 0 < config.max_accumulated_residual_diff <= accumulated:
        return "max_accumulated"
    return None


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes behind `tensors`, each storage counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
