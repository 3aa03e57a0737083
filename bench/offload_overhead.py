"""What SlipstreamLayerOffload costs where it offloads nothing: microseconds per model call.

    python bench offload_overhead     from the pack's folder, with any Python that has torch

The model is a stand-in that does nothing and whose weights all fit, so what is left is the pack's
own Python. Both sides run in one process in turn; a line gives medians of paired differences.
Reading a GPU's memory counters and events comes on top there: unverified.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig
from ..backends.calls import RUN
from ..backends.offload.apply import apply_offload, hook_blocks
from ..backends.offload.blocks import Unit
from ..backends.offload.config import OffloadConfig
from ..backends.offload.driver import BlockDriver
from ..backends.offload.timing import BlockTimes, DeviceClock
from ..backends.run import Run, apply_model, attached
from .attention_overhead import per_call_us
from .offload_pages import LINES
from .paired import take_turns
from .reference import Executor, ReferencePatcher

CALLS = 2000
STEPS = 30
SETTLED_STEP = 10  # behind the steps that a run measures, plans and judges
NUM_BLOCKS = 50
ACCELERATOR = torch.device("meta")  # not a CPU, and without counters or events


class RoomyPatcher(ReferencePatcher):
    """A MODEL whose weights are all on an accelerator, for the names that offload asks for."""

    def __init__(self, model: torch.nn.Module | None = None):
        super().__init__(model)
        self.load_device = ACCELERATOR
        self.model.model_loaded_weight_memory = self.model_size()

    def model_size(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    def loaded_size(self) -> int:
        return self.model_size()

    def partially_load(self, device_to: Any, extra_memory: float = 0, **_: Any) -> int:
        return 0

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_: Any) -> int:
        return 0


def settled_run(mode: str | None) -> Run:
    """A run that is past the steps it measures; mode None: with another node of ours instead."""
    base = RoomyPatcher()
    if mode is None:
        model = apply_cache(base, CacheConfig())
    else:
        model = apply_offload(base, OffloadConfig(mode=mode))
    run = Run(model, torch.linspace(1, 0, STEPS + 1), attached(model))
    run.start()
    call = model_call(run, apply_model, hook_blocks)
    for sigma in run.sigmas[: SETTLED_STEP + 1]:
        run.begin_evaluation(sigma)
        call()
    return run


def model_call(run: Run, *wrappers: Callable[..., Any]) -> Callable[[], Any]:
    """One call of a model that does nothing, inside `wrappers`."""
    options = {RUN: run, "cond_or_uncond": [0], "uuids": ["a"]}
    executor = Executor(lambda *_, **__: None, run.patcher.model, list(wrappers))

    def call() -> Any:
        return executor.execute(None, None, None, None, None, options)

    return call


def sides() -> dict[str, Callable[[int], float]]:
    """Name -> what takes the microseconds of one call."""
    other = settled_run(None)
    calls = {"nothing": model_call(other), "run": model_call(other, apply_model)}
    for mode in ("off", "auto", "speed"):
        calls[mode] = model_call(settled_run(mode), apply_model, hook_blocks)
    found = {name: _timed(call) for name, call in calls.items()}
    return {**found, "blocks": _timed(_walk(None)), "timed blocks": _timed(_walk(NUM_BLOCKS))}


def _timed(call: Callable[[], Any]) -> Callable[[int], float]:
    return lambda _: per_call_us(call, CALLS)


def _walk(num_timed: int | None) -> Callable[[], Any]:
    """A call of blocks that do nothing; num_timed: how many of them take their times."""
    modules = [torch.nn.Identity() for _ in range(NUM_BLOCKS)]
    units = [Unit(at, f"block/{at}", module) for at, module in enumerate(modules)]
    driver = BlockDriver(units)

    def plain() -> None:
        for module in modules:
            module(None)

    def timed() -> None:
        with driver.call(lambda _: (set(), True), BlockTimes(DeviceClock(ACCELERATOR))):
            plain()

    return plain if num_timed is None else timed


def costs(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Line -> paired differences in microseconds."""
    pairs = {
        "run": ("run", "nothing"),
        **{mode: (mode, "run") for mode in ("off", "auto", "speed")},
    }
    found = {
        name: [a - b for a, b in zip(seconds[one], seconds[other], strict=True)]
        for name, (one, other) in pairs.items()
    }
    blocks = zip(seconds["timed blocks"], seconds["blocks"], strict=True)
    return {**found, "timed_block": [(a - b) / NUM_BLOCKS for a, b in blocks]}


def measure(rounds: int) -> dict[str, Any]:
    """Median and quartiles of every line, in microseconds."""
    found = costs(take_turns(sides(), rounds))
    return {
        name: {
            "median_us": round(statistics.median(values), 2),
            "quartiles_us": [round(x, 2) for x in statistics.quantiles(values, n=4)[::2]],
        }
        for name, values in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="write offload-overhead.json into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds)
    for name, line in LINES.items():
        low, high = found[name]["quartiles_us"]
        print(f"{found[name]['median_us']:8.2f} us  {line} (quartiles {low} to {high})")
    if options.out is not None:
        from .environment import environment

        command = "python bench offload_overhead --out docs/benchmarks"
        result = {"command": command, "environment": environment(cpu=True), "costs": found}
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / "offload-overhead.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{file}: python bench pages writes its page")
    return 0
