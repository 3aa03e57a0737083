"""What `python bench offload` measures of one model, step by step; see docs/offload.md.

Every number is from ComfyUI's own sampler. Times are medians of the steps behind the warm-up, on
the host's clock after the device has finished.
"""

import itertools
import statistics
import time
from typing import Any

import torch

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig
from ..backends.memory import counters
from ..backends.memory import host as memory
from ..backends.offload import host
from ..backends.offload.apply import apply_offload, small_bytes
from ..backends.offload.budget import buffer_bytes
from ..backends.offload.config import GIB, OffloadConfig
from ..backends.run import run_log
from .offload_models import Case

SHARES = (0.0, 0.25, 0.5, 1.0)
SEEDS = (1, 2, 3)
NUM_RUNS = 20
WARM_UP = 3  # steps


def measure(case: Case, *, num_runs: int = NUM_RUNS) -> dict[str, Any]:
    """All of it; some minutes on a GPU. num_runs: over which nothing may grow, 3 or more."""
    model = case.load()
    device = model.load_device
    shape = list(case.sizes.values())[len(case.sizes) // 2]
    return {
        "copy_rates": list(host.copy_rates(device)),
        "weight_bytes": memory.weight_bytes(model),
        "caps": caps(case, model, shape),
        "times": [times(case, model, name, size) for name, size in case.sizes.items()],
        "equal_bits": equal_bits(case, model, shape, cached=False),
        "equal_bits_cached": equal_bits(case, model, shape, cached=True),
        "plan": plan(case, model, shape),
        "flat": flat(case, model, shape, num_runs),
    }


def budgeted(model: Any, share: float, prefetch: float) -> Any:
    """`model` with `share` of its weights resident beside the buffers."""
    config = OffloadConfig(mode="manual", vram_budget_gb=1.0, prefetch=prefetch)
    resident = max(share * memory.weight_bytes(model), small_bytes(model))
    budget = (resident + buffer_bytes(model, config)) / GIB
    return apply_offload(
        model, OffloadConfig(mode="manual", vram_budget_gb=budget, prefetch=prefetch)
    )


def sample(
    case: Case, model: Any, shape: tuple[int, ...], *, seed: int = 1, steps: int = 0
) -> tuple[torch.Tensor, float]:
    """The latent, and the median seconds of a step behind the warm-up."""
    import comfy.sample  # type: ignore[import-not-found]

    marks: list[float] = []

    def mark(*_: Any) -> None:
        counters.synchronize(model.load_device)
        marks.append(time.perf_counter())

    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, seed)
    text = case.conditioning()
    steps = steps or case.steps
    result = comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", text, text, latent,
        callback=mark, disable_pbar=True, seed=seed,
    ).cpu()  # fmt: skip
    end_node()
    taken = [b - a for a, b in itertools.pairwise(marks)][WARM_UP - 1 :]
    return result, statistics.median(taken) if taken else 0.0


def end_node() -> None:
    """What ComfyUI does after every node in dynamic mode (execution.py, 0.33)."""
    import comfy.memory_management
    import comfy.model_management as management

    if comfy.memory_management.aimdo_enabled:
        import comfy.model_prefetch

        management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()


def used(model: Any) -> int:
    counted = counters.free_and_total(model.load_device)
    assert counted is not None
    return counted[1] - counted[0]


def caps(case: Case, model: Any, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Device use against the budget. Activations are those of a run with everything resident."""
    import comfy.model_management as management

    management.unload_all_models()
    empty = used(model)
    counters.reset_peak(model.load_device)
    sample(case, model, shape)
    full = counters.used_peak(model.load_device)
    assert full is not None
    activations = max(full - empty - memory.resident_bytes(model), 0)
    found = []
    for share in SHARES:
        management.unload_all_models()
        one = budgeted(model, share, 0)
        counters.reset_peak(model.load_device)
        sample(case, one, shape)
        peak = counters.used_peak(model.load_device)
        assert peak is not None
        fields = latest(one)
        allowed = empty + activations + min(fields["budget_bytes"], memory.placed_bytes(model))
        found.append(
            {
                "share": share,
                "resident_bytes": fields["resident_bytes"],
                "excess_bytes": peak - allowed,
            }
        )
    sample(case, model, shape)
    refilled = memory.resident_bytes(model) / memory.placed_bytes(model)
    return [*found, {"share": 1.0, "resident_bytes": memory.resident_bytes(model),
                     "excess_bytes": 0, "refilled": refilled}]  # fmt: skip


def times(case: Case, model: Any, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a step: all resident, without and with the node, all streamed by ComfyUI, all
    streamed with prefetch."""
    _, resident = sample(case, model, shape)
    _, speed = sample(case, apply_offload(model, OffloadConfig(mode="speed")), shape)
    _, core = sample(case, budgeted(model, 0.0, -1), shape)
    _, prefetch = sample(case, budgeted(model, 0.0, 0), shape)
    copying = memory.weight_bytes(model) / host.copy_rates(model.load_device)[0]
    hidden = 1.0 - (prefetch - resident) / copying
    return {
        "size": name,
        "resident": resident,
        "speed": speed,
        "core": core,
        "prefetch": prefetch,
        "copying": copying,
        "overlap": min(max(hidden, 0.0), 1.0),
    }


def equal_bits(case: Case, model: Any, shape: tuple[int, ...], *, cached: bool) -> bool:
    """Whether streamed runs give the resident run's bits, with three seeds."""
    config = CacheConfig(
        strategy="fbcache",
        engine="builtin",
        warmup=2,
        front_blocks=1,
        residual_diff_threshold=0.9,
        max_continuous_cached_steps=2,
    )  # some steps are reused
    base = apply_cache(model, config) if cached else model
    streamed = budgeted(base, 0.0, 0)
    pairs = (
        (sample(case, base, shape, seed=s)[0], sample(case, streamed, shape, seed=s)[0])
        for s in SEEDS
    )
    return all(a.equal(b) for a, b in pairs)


def plan(case: Case, model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Predicted against measured step of mode memory; the second run begins with the plan."""
    patched = apply_offload(model, OffloadConfig(mode="memory"))
    for _ in range(2):
        sample(case, patched, shape)
    fields = latest(patched)
    predicted, measured = fields["predicted_step_seconds"], fields["measured_step_seconds"]
    if predicted is None:  # nothing to plan: rolled back, or everything resident
        predicted = measured
    return {
        "predicted": predicted,
        "measured": measured,
        "error": abs(predicted - measured) / measured,
        "stall": fields["stall_seconds"],
        "resident_bytes": fields["resident_bytes"],
        "rolled_back": fields["rolled_back"],
    }


def flat(case: Case, model: Any, shape: tuple[int, ...], num_runs: int) -> dict[str, Any]:
    """Growth of RAM, pinned RAM and device memory from the third of many runs to the last."""
    patched = budgeted(model, 0.25, 0)
    seen = []
    for seed in range(num_runs):
        sample(case, patched, shape, seed=seed, steps=2)
        seen.append((process_bytes(), pinned_bytes(), used(model)))
    growth = [last - first for first, last in zip(seen[2], seen[-1], strict=True)]
    return {
        "runs": num_runs,
        "growth_bytes": dict(zip(("ram", "pinned", "device"), growth, strict=True)),
    }


def pinned_bytes() -> int:
    import comfy.model_management as management

    return int(management.TOTAL_PINNED_MEMORY)


def process_bytes() -> int:
    import psutil  # type: ignore[import-untyped]  # a requirement of ComfyUI

    return int(psutil.Process().memory_info().rss)


def latest(patched: Any) -> dict[str, Any]:
    """The offload section of the latest run's report."""
    log = run_log(patched)
    record = log.latest() if log is not None else None
    assert record is not None
    return record.sections["offload"].json
