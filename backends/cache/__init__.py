"""Caching: reuse what an earlier step computed. `apply_cache(model, config)` is the way in."""

from .apply import apply_cache
from .config import PRESETS, STRATEGIES, CacheConfig

__all__ = ["PRESETS", "STRATEGIES", "CacheConfig", "apply_cache"]
