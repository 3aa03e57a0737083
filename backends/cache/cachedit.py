"""cache-dit as the engine: its CachedContextManager decides and stores, its calibrators predict.

Never `enable_cache`: that replaces block lists on the shared module and counts calls as steps. Here
every key has a context of its own whose step is the evaluation index we give it; warmup, cooldown
and masks stay ours. Names used exist in cache-dit 1.2.3 to 1.5.3 (DMD from 1.5).
"""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Hashable
from typing import Any

import torch

from .config import CacheConfig
from .engine import Answer, Streams, limit_reached, storage_bytes

_FRONT, _RESIDUAL = "Fn_residual", "Bn_residual"
PIP = "pip install cache-dit diffusers"


@functools.cache  # reading it takes a millisecond; a running process never sees another one
def installed_version() -> str | None:
    """Of the package cache-dit."""
    try:
        return importlib.metadata.version("cache-dit")
    except importlib.metadata.PackageNotFoundError:
        return None


def unavailable(calibrator: str = "none") -> str | None:
    """Why cache-dit cannot be the engine here, as a sentence that ends with the fix, or None."""
    version = installed_version()
    if version is None or importlib.util.find_spec("cache_dit") is None:
        return f"cache-dit is not installed: {PIP}, or set engine to builtin."
    if calibrator == "dmd" and _version_numbers(version) < (1, 5):
        return f"dmd needs cache-dit 1.5 or newer, found {version}."
    try:
        _import_cache_dit()
    except Exception as error:  # noqa: BLE001 - one that fits no package beside it raises anything
        return f"cache-dit {version} cannot be imported ({error}): {PIP}, or set engine to builtin."
    return None


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _import_cache_dit() -> Any:
    """The package; its import (4 to 8 s) sets environment variables, which are put back."""
    loaded = sys.modules.get("cache_dit.caching")
    if loaded is not None:
        return loaded
    before = dict(os.environ)
    try:
        import cache_dit.caching
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
    return cache_dit.caching


class CacheDitEngine:
    """One CachedContext per key, driven step by step. Close it: the manager keeps tensors alive."""

    needs_metric = True

    def __init__(self, config: CacheConfig):
        caching = _import_cache_dit()
        self.label = f"cache-dit {installed_version()}"
        self._config, self._caching = config, caching
        self._manager = caching.CachedContextManager(name="slipstream", persistent_context=True)
        self._contexts: dict[Hashable, Any] = {}
        self._num_streams: dict[Hashable, int] = {}

        # A context counts calls as steps by itself; ours is told the evaluation.
        self._context_class = type(
            "EvaluationContext",
            (caching.CachedContext,),
            {"evaluation": 0, "get_current_step": lambda context: context.evaluation},
        )

    def begin(self, key: Hashable, evaluation: int) -> None:
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = self._new_context(key)
        context.evaluation = evaluation
        context.mark_step_begin()

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        context = self._contexts[key]
        if metric is None:
            return Answer(False, None, "no metric")
        limit = limit_reached(
            self._config,
            num_cached=len(context.get_cached_steps()),
            streak=context.continuous_cached_steps,
            accumulated=context.get_accumulated_residual_diff(),
        )
        self._activate(context)
        reuse = self._manager.can_cache(metric, parallelized=False, prefix=_FRONT)
        diff = context.get_residual_diffs().get(str(context.evaluation))
        if diff is not None and diff >= 0:
            return Answer(reuse, diff, "below threshold" if reuse else "above threshold")
        return Answer(reuse, None, limit or "no metric")

    def settle(self, key: Hashable, reuse: bool) -> None:
        if reuse:
            self._contexts[key].add_cached_step()

    def observe(self, key: Hashable, reuse: bool, metric: torch.Tensor) -> None:
        if not reuse:
            self._activate(self._contexts[key])
            self._manager.set_Fn_buffer(metric, prefix=_FRONT)

    def store(self, key: Hashable, residual: Streams) -> None:
        context = self._contexts[key]
        self._activate(context)
        self._num_streams[key] = len(residual)
        self._manager.set_Bn_buffer(residual[0], prefix=_RESIDUAL)
        if len(residual) > 1:
            self._manager.set_Bn_encoder_buffer(residual[1], prefix=_RESIDUAL)
        for calibrator in (context.calibrator, context.encoder_calibrator):
            _drop_previous(calibrator)
        # The calibrators hold the same tensor; this name makes it readable without extrapolating.
        for index, stream in enumerate(residual):
            self._manager.set_buffer(f"slipstream_{index}", stream)

    def predict(self, key: Hashable, extrapolate: bool) -> Streams:
        self._activate(self._contexts[key])
        count = self._num_streams[key]
        if not extrapolate:
            return tuple(self._manager.get_buffer(f"slipstream_{i}") for i in range(count))
        first = self._manager.get_Bn_buffer(_RESIDUAL)
        if count == 1:
            return (first,)
        second = self._manager.get_Bn_encoder_buffer(_RESIDUAL)
        others = (self._manager.get_buffer(f"slipstream_{i}") for i in range(2, count))
        return first, second, *others

    def drop(self, key: Hashable) -> None:
        context = self._contexts.pop(key, None)
        self._num_streams.pop(key, None)
        if context is not None:
            context.clear_buffers()
            if self._manager.current_context is context:
                self._manager._current_context = None

    def nbytes(self) -> int:
        tensors: list[torch.Tensor] = []
        for context in self._contexts.values():
            tensors += [t for t in context.buffers.values() if isinstance(t, torch.Tensor)]
            for calibrator in (context.calibrator, context.encoder_calibrator):
                tensors += _tensors_of(calibrator)
        return storage_bytes(tensors)

    def close(self) -> None:
        for key in list(self._contexts):
            self.drop(key)
        self._manager.clear_contexts()
        self._manager._current_context = None  # it would keep the last context's tensors alive

    def _activate(self, context: Any) -> None:
        """The manager's methods work on its current context, and setting one is not free."""
        if self._manager.current_context is not context:
            self._manager.set_context(context)

    def _new_context(self, key: Hashable) -> Any:
        config, caching = self._config, self._caching
        limit = config.max_accumulated_residual_diff
        cache_config = caching.DBCacheConfig(
            Fn_compute_blocks=config.front_blocks,
            Bn_compute_blocks=config.back_blocks,
            residual_diff_threshold=config.residual_diff_threshold,
            max_accumulated_residual_diff_threshold=limit if limit > 0 else None,
            max_warmup_steps=0,
            max_cached_steps=config.max_cached_steps,
            max_continuous_cached_steps=config.max_continuous_cached_steps,
            enable_separate_cfg=False,
        )
        return self._context_class(
            name=str(key),
            cache_config=cache_config,
            calibrator_config=self._calibrator_config(),
        )

    def _calibrator_config(self) -> Any:
        name = self._config.calibrator
        if name == "taylorseer":
            order = self._config.calibrator_order
            return self._caching.TaylorSeerCalibratorConfig(taylorseer_order=order)
        if name == "foca":
            return self._caching.FoCaCalibratorConfig()
        return self._caching.DMDCalibratorConfig() if name == "dmd" else None


def _drop_previous(calibrator: Any) -> None:
    """Let go of the differences that TaylorSeer has used up.

    Its update() copies dY_current to dY_prev before it reads dY_prev, so what lies there in between
    is one more set of states (cache-dit 1.2.3 to 1.5.3, taylorseer.py).
    """
    for state in getattr(calibrator, "states", {}).values():
        held = getattr(state, "state", None)
        if isinstance(held, dict) and set(held) == {"dY_prev", "dY_current"}:
            held["dY_prev"] = [None] * len(held["dY_prev"])


def _tensors_of(value: Any, depth: int = 8) -> list[torch.Tensor]:
    """Tensors inside a calibrator: in its attributes, dicts and lists, down to `depth` levels."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth == 0 or value is None:
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [t for part in parts for t in _tensors_of(part, depth - 1)]
