"""Measures of the offload checks: budgets as shares of a model, and what a run left behind."""

from typing import Any

import fake_vbar
import torch
from slipstream.backends.memory import host as memory
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import GIB, OffloadConfig
from slipstream.backends.run import run_log
from slipstream.bench.offload_steps import budgeted


def offloaded(model: Any, share: float, prefetch: float = 0) -> Any:
    """`model` under mode manual with `share` of its weights resident beside the buffers."""
    return budgeted(model, share, prefetch)


def in_mode(model: Any, mode: str, share: float = 0.0, prefetch: float = 0.0) -> Any:
    """`model` in another mode, with a budget of `share` of its weights; 0: none."""
    gib = share * memory.weight_bytes(model) / GIB
    config = OffloadConfig(mode=mode, vram_budget_gb=gib, prefetch=prefetch)
    return apply_offload(model, config)


def resident_share(model: Any) -> float:
    return memory.resident_bytes(model) / memory.placed_bytes(model)


def report(model: Any) -> dict[str, Any]:
    """The JSON of the latest run."""
    return run_log(model).latest().to_json()


def leftovers(model: Any) -> dict[str, int]:
    """What a run must not leave: hooks, prefetched weights, pins, parameters off their place."""
    modules = list(model.model.modules())
    return {
        "hooks": sum("forward" in m.__dict__ for m in modules),
        "prefetches": sum(hasattr(m, "_prefetch") for m in modules),
        "pins": sum(vbar.num_pinned() for vbar in fake_vbar.FakeVBAR.made),
        "prepared": sum(
            getattr(f, "prepared_patches", None) is not None
            for m in modules
            for f in (*getattr(m, "weight_function", ()), *getattr(m, "bias_function", ()))
        ),
        "bare": sum(
            not isinstance(p, torch.nn.Parameter)
            for m in modules
            for p in m._parameters.values()
            if p is not None
        ),
    }


NOTHING = {"hooks": 0, "prefetches": 0, "pins": 0, "prepared": 0, "bare": 0}
