"""The engine without dependencies: decides and stores exactly as cache-dit's manager does."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from .config import CacheConfig
from .engine import Answer, Streams, limit_reached, relative_change, storage_bytes
from .taylor import TaylorSeries


@dataclass
class _Branch:
    """What one key remembers. evaluation: of the current call; last_reused: of the last hit."""

    evaluation: int = -1
    last_reused: int | None = None
    streak: int = 0
    num_cached: int = 0
    accumulated: float = 0.0
    front: torch.Tensor | None = None
    series: list[TaylorSeries] = field(default_factory=list)


class BuiltinEngine:
    """Relative change of the front residual against a threshold, with DBCache's limits."""

    label = "builtin"
    needs_metric = True

    def __init__(self, config: CacheConfig):
        self._config = config
        self._order = config.calibrator_order if config.calibrator == "taylorseer" else 0
        self._branches: dict[Hashable, _Branch] = {}

    def begin(self, key: Hashable, evaluation: int) -> None:
        branch = self._branches.setdefault(key, _Branch())
        branch.evaluation = evaluation
        if branch.last_reused != evaluation - 1:
            branch.streak = 0
        for series in branch.series:
            series.begin()

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        branch, config = self._branches[key], self._config
        limit = limit_reached(
            config,
            num_cached=branch.num_cached,
            streak=branch.streak,
            accumulated=branch.accumulated,
        )
        if limit is not None:
            return Answer(False, None, limit)
        if config.residual_diff_threshold <= 0:
            return Answer(False, None, "threshold 0")
        if metric is None or branch.front is None or branch.front.shape != metric.shape:
            return Answer(False, None, "no metric")
        diff = relative_change(branch.front, metric)
        if diff > 0:
            branch.accumulated += diff
        reuse = diff < config.residual_diff_threshold
        return Answer(reuse, diff, "below threshold" if reuse else "above threshold")

    def settle(self, key: Hashable, reuse: bool) -> None:
        branch = self._branches[key]
        if reuse:
            branch.last_reused = branch.evaluation
            branch.streak += 1
            branch.num_cached += 1

    def observe(self, key: Hashable, reuse: bool, metric: torch.Tensor) -> None:
        if not reuse:
            self._branches[key].front = metric

    def store(self, key: Hashable, residual: Streams) -> None:
        branch = self._branches[key]
        if len(branch.series) != len(residual):
            branch.series = [TaylorSeries(self._order) for _ in residual]
        for series, stream in zip(branch.series, residual, strict=True):
            series.update(stream)

    def predict(self, key: Hashable, extrapolate: bool) -> Streams:
        series = self._branches[key].series
        return tuple(s.predict() if extrapolate else s.latest for s in series)

    def drop(self, key: Hashable) -> None:
        self._branches.pop(key, None)

    def nbytes(self) -> int:
        tensors = []
        for branch in self._branches.values():
            tensors += [t for series in branch.series for t in series.tensors]
            tensors += [branch.front] if branch.front is not None else []
        return storage_bytes(tensors)

    def close(self) -> None:
        self._branches.clear()
