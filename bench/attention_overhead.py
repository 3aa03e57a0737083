"""What SlipstreamAttention costs where it changes nothing: per call, and per step of a small DiT.

    python bench attention_overhead     from the pack's folder, with any Python that has torch

Both sides run in one process in turn; a line gives medians of paired differences or ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..backends.attention.apply import apply_attention
from ..backends.attention.config import AttentionConfig
from ..backends.attention.override import BOUND
from ..backends.calls import BranchKey, ModelCall
from ..backends.run import Run, attached
from .reference import ReferenceDiT, ReferenceModel, ReferencePatcher
from .reference_sampler import sample


def per_call_us(call: Callable[[], Any], repeats: int = 20000) -> float:
    """Microseconds of one call, averaged over `repeats`."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats * 1e6


def dispatch_us(rounds: int) -> list[float]:
    """Microseconds that a declined call costs over ComfyUI's wrapper without an override."""

    model = apply_attention(ReferencePatcher(), AttentionConfig(policy="exact"))
    run = Run(model, torch.linspace(1, 0, 5), attached(model))
    run.start()
    call = ModelCall(0, 0, 0, BranchKey((), 0, None), (0,))
    state: Any = run.states["attention"]
    bound = state.bind(call)
    q = torch.zeros(1, 2, 4, 8)
    override = model.model_options["transformer_options"]["optimized_attention_override"]
    options = {"block_type": "double", "block_index": 3, BOUND: bound}

    def nothing(q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> torch.Tensor:
        return q

    def through(use_override: bool) -> Callable[[], Any]:
        def call() -> Any:
            kwargs = {"skip_reshape": True, "transformer_options": options}
            bound.ordinals.clear()
            if use_override:
                return override(nothing, q, q, q, 2, **kwargs)
            return nothing(q, q, q, 2, **kwargs)

        return call

    plain, hooked = through(False), through(True)
    hooked()
    return [per_call_us(hooked) - per_call_us(plain) for _ in range(rounds)]


def step_ratios(rounds: int) -> list[float]:
    """Seconds of a run with the node over seconds without it."""

    net = ReferenceDiT(width=128, num_heads=2, num_layers=8)
    base = ReferencePatcher(ReferenceModel(net))
    noded = apply_attention(base, AttentionConfig())
    noise = torch.randn(1, 16, 32, 32)

    def seconds(model: Any) -> float:
        started = time.perf_counter()
        sample(model, noise, steps=8)
        return time.perf_counter() - started

    for model in (base, noded):
        seconds(model)
    return [seconds(noded) / seconds(base) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calls, ratios = dispatch_us(args.rounds), step_ratios(args.rounds)
    found: dict[str, Any] = {
        "dispatch_us": round(statistics.median(calls), 2),
        "dispatch_us_quartiles": [round(x, 2) for x in statistics.quantiles(calls, n=4)[::2]],
        "step_ratio": round(statistics.median(ratios), 4),
        "step_ratio_quartiles": [round(x, 4) for x in statistics.quantiles(ratios, n=4)[::2]],
        "torch": torch.__version__,
    }
    if args.json:
        print(json.dumps(found))
        return
    low, high = found["dispatch_us_quartiles"]
    print(f"declined attention call: +{found['dispatch_us']} us (quartiles {low} to {high})")
    low, high = found["step_ratio_quartiles"]
    print(f"step of a small DiT:     x{found['step_ratio']} (quartiles {low} to {high})")
