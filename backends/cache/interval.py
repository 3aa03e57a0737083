"""The engine of strategies that compute every n-th evaluation and compare nothing."""

from collections.abc import Hashable

import torch

from .builtin import BuiltinEngine
from .config import CacheConfig
from .engine import Answer


class IntervalEngine(BuiltinEngine):
    """Reuses `interval` - 1 evaluations after each computed one."""

    needs_metric = False

    def __init__(self, interval: int):
        super().__init__(CacheConfig())
        self._interval = interval

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        reuse = self._branches[key].streak < self._interval - 1
        return Answer(reuse, None, "interval")
