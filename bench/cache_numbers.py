"""What a cache decision costs, and how many blocks each strategy still computes.

    python bench cache_numbers [--rounds N] [--out FILE.json]     with ComfyUI's Python

Decision cost: one evaluation of one branch, without the model and without cache-dit. Blocks and
errors: tiny Flux and Wan, 20 steps, cfg 4, random weights: they rank mechanisms, never pictures.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..backends.cache.apply import apply_cache
from ..backends.cache.builtin import BuiltinEngine
from ..backends.cache.cachedit import CacheDitEngine, unavailable
from ..backends.cache.config import CacheConfig
from ..backends.cache.decisions import Decisions
from ..backends.cache.engine import Engine
from ..backends.cache.schedule import Schedule
from ..backends.calls import BranchKey, ModelCall
from ..backends.run import run_log
from . import cache_models
from .cache_pages import numbers_page
from .environment import environment
from .in_process import use_comfyui

NUM_DECISIONS = 2000
STRATEGIES = ("auto", "cache-dit", "fbcache", "taylorseer", "scm", "teacache", "pab",
              "fastercache-cfg", "output")  # fmt: skip


def decision_us(engine: Engine, *, hidden: tuple[int, ...] = (1, 64, 128)) -> float:
    """Microseconds of one evaluation of one branch: begin, compare, settle, predict."""
    run: Any = SimpleNamespace(sigma=1.0)
    schedule = Schedule(num_steps=10**9)
    decisions = Decisions(run, schedule, engine, shared=False)
    state = torch.randn(hidden)
    key = BranchKey(("cond",), 0, None)

    def evaluate(evaluation: int) -> None:
        call = ModelCall(evaluation, evaluation, evaluation, key, (0,))
        run.sigma = -float(evaluation)
        decision = decisions.begin(call, (hidden,)) or decisions.ask(call, state)
        if decision.reuse:
            decisions.predict(call)
        else:
            decisions.observe(call, False, state)
            decisions.store(call, (state,), (hidden,))

    for evaluation in range(20):
        evaluate(evaluation)
    started = time.perf_counter()
    for evaluation in range(20, 20 + NUM_DECISIONS):
        evaluate(evaluation)
    return (time.perf_counter() - started) / NUM_DECISIONS * 1e6


def override_us(rounds: int) -> float:
    """Microseconds per block that a computed call pays for standing under the override."""
    from ..backends.architectures import Architecture, Stack
    from ..backends.cache.stack import StackOverride, logical_stack

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    network = torch.nn.Module()
    stack = torch.nn.ModuleList(Block() for _ in range(57))
    network.blocks = stack
    architecture = Architecture(
        class_name="N", name="N", stacks=(Stack(blocks="blocks", block_type="b"),)
    )
    blocks = logical_stack(network, architecture)
    x = torch.zeros(1, 4, 8)

    def once(overridden: bool) -> float:
        started = time.perf_counter()
        if overridden:
            with StackOverride(
                blocks, front=1, last=56, reuse=False, decide=bool, predict=tuple
            ):  # fmt: skip
                for block in stack:
                    block(x)
        else:
            for block in stack:
                block(x)
        return (time.perf_counter() - started) * 1e6 / len(blocks)

    once(True)
    return statistics.median(once(True) - once(False) for _ in range(rounds * 10))


def cost(rounds: int) -> dict[str, float]:
    """Medians over `rounds`."""
    settings: dict[str, Any] = {"residual_diff_threshold": 0.5, "max_continuous_cached_steps": 3}
    config = CacheConfig(**settings)
    taylor = CacheConfig(**settings, calibrator="taylorseer")
    engines: dict[str, Callable[[], Engine]] = {
        "builtin": lambda: BuiltinEngine(config),
        "builtin, taylorseer": lambda: BuiltinEngine(taylor),
    }
    if unavailable() is None:
        engines["with cache-dit"] = lambda: CacheDitEngine(config)
    found = {
        name: round(statistics.median(decision_us(make()) for _ in range(rounds)), 1)
        for name, make in engines.items()
    }
    found["per block under the override"] = round(override_us(rounds), 2)
    return found


def blocks_of(family: str, strategy: str) -> dict[str, Any]:
    """One strategy at cache_ratio 0.5 against the plain model, 20 steps."""
    model = cache_models.load(family)
    counter = cache_models.BlockCounter(model, family)
    reference = cache_models.sample(model, family)
    plain = counter.take()
    patched = apply_cache(model, CacheConfig.from_ratio(0.5, strategy=strategy))
    out = cache_models.sample(patched, family)
    computed = counter.take()
    log = run_log(patched)
    record = log.latest() if log is not None else None
    assert record is not None
    section = record.to_json()["cache"]
    return {
        "family": family,
        "strategy": strategy,
        "did": section["strategy"],
        "engine": section["engine"],
        "hits": section["hits"],
        "blocks": computed,
        "plain_blocks": plain,
        "fewer": round(plain / computed, 2),
        "relative_error": round(cache_models.relative_error(reference, out), 4),
        "peak_bytes": section["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write JSON there; a page is made of it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    comfyui = use_comfyui()
    with torch.inference_mode():
        found = {
            "command": "python bench cache_numbers --out docs/benchmarks/cache.json",
            "environment": environment(comfyui=comfyui),
            "decision_us": cost(args.rounds),
            "strategies": [blocks_of(f, s) for f in cache_models.FAMILIES for s in STRATEGIES],
        }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(numbers_page(found))
