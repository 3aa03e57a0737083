"""apply_cache: a clone of a MODEL whose sampling runs reuse earlier results."""

from typing import Any

from ..calls import call_options
from ..run import attach, current
from .config import CacheConfig
from .decisions import Decider
from .technique import NAME, CacheState, CacheTechnique

KEY = "slipstream.cache"


def apply_cache(
    patcher: Any,
    config: CacheConfig,
    *,
    decider: Decider | None = None,
    notes: tuple[str, ...] = (),
) -> Any:
    """A clone of `patcher` with the cache on it, in place of an earlier one; `patcher` stays as is.

    decider(call, reuse): called once per decided model call with what this process would do; what
    it returns is done (reuse without anything stored stays a computation). notes: for the report.
    """
    clone = patcher.clone()
    attach(clone, CacheTechnique(config, decider, notes))
    for kind, wrapper in _WRAPPERS.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL wrapper."""
    return _call("diffusion_model", executor, args, kwargs, call_options(args, kwargs))


def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper."""
    return _call("apply_model", executor, args, kwargs, call_options(args, kwargs))


def calc_cond_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """CALC_COND_BATCH wrapper: (model, conds, x, timestep, model_options)."""
    model_options = kwargs.get("model_options") or args[-1]
    options = model_options.get("transformer_options")
    return _call("calc_cond_batch", executor, args, kwargs, options)


_WRAPPERS = {
    "diffusion_model": diffusion_model,
    "apply_model": apply_model,
    "calc_cond_batch": calc_cond_batch,
}


def _call(
    kind: str, executor: Any, args: Any, kwargs: dict[str, Any], options: dict[str, Any] | None
) -> Any:
    run = current(options)
    state = run.states.get(NAME) if run is not None else None
    if not isinstance(state, CacheState):
        return executor(*args, **kwargs)
    return state.call(kind, executor, args, kwargs, options)
