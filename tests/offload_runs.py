"""Runs of the offload tuner on a clock that the test sets: steps of model calls that take a time.

Used by test_offload_tuner.py and test_offload_figures.py.
"""

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from slipstream.backends.offload import host, tuner
from slipstream.backends.offload.blocks import Unit
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.offload.measure import Proposal
from slipstream.backends.offload.plan import Forecast, OffloadPlan
from slipstream.backends.offload.trial import Setting
from slipstream.backends.offload.tuner import Tuner

PLAN = OffloadPlan(
    resident_bytes=500,
    resident_blocks=(0, 2),
    depth=1,
    forecast=Forecast(seconds=1, stall_seconds=0),
    why="because",
)
CALL_SECONDS = 1.0
Seconds = Callable[[int, Setting, bool], float]  # step, setting, first under it -> of a model call


def FLAT(step: int, setting: Setting, is_first: bool) -> float:
    return CALL_SECONDS


def seconds_of(*, plain: float, staged: float, first: float, less: float = 0.0) -> Seconds:
    """By setting: plain, with prefetch, with fewer weights (`less`); times `first` at first."""

    def seconds(step: int, setting: Setting, is_first: bool) -> float:
        one = staged if setting.prefetches else plain
        if less and setting.resident_bytes is not None:
            one = less
        return one * (first if is_first else 1.0)

    return seconds


class Clock:
    """Marks are the seconds that the test has let pass."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def bare(
    config: OffloadConfig, modules: Sequence[Any], *, can_prefetch: bool, num_steps: int
) -> Tuner:
    """A tuner on a clock of its own; notes in `measured_steps` which steps it measured."""
    patcher = SimpleNamespace(load_device=torch.device("cpu"))
    units = [Unit(at, f"block/{at}", module) for at, module in enumerate(modules)]
    one = Tuner(patcher, config, units, can_prefetch=can_prefetch, num_steps=num_steps)
    one.steps.clock = Clock()
    one.measured_steps = []
    return one


def make(
    monkeypatch: Any,
    config: OffloadConfig,
    *,
    gain: float = 0.2,
    is_short: bool = False,
    needs_room: bool = False,
    can_prefetch: bool = True,
    can_stage: bool = True,
    num_steps: int = 20,
    plan: OffloadPlan = PLAN,
    modules: Sequence[Any] = (),
) -> Tuner:
    """A tuner whose plan is PLAN, with `gain` expected of prefetch."""
    proposal = Proposal(
        plan=plan, step_seconds=0.9, unchanged_seconds=0.8, prefetch_gain=gain, is_short=is_short,
        needs_room=needs_room, can_stage=can_stage, fits_bytes=700,
    )  # fmt: skip
    monkeypatch.setattr(tuner.measure, "propose", lambda *args: proposal)
    monkeypatch.setattr(host, "has_weight_hooks", lambda patcher: False)
    own = modules or [SimpleNamespace() for _ in range(3)]
    return bare(config, own, can_prefetch=can_prefetch, num_steps=num_steps)


def run(
    one: Tuner,
    num_steps: int,
    seconds: Seconds = FLAT,
    *,
    calls: Callable[[int], Sequence[tuple[str, float]]] = lambda step: [("", 1.0)],
    skips: Collection[int] = (),
    breaks: bool = False,
    blocks: Callable[[Setting], Sequence[float]] | None = None,
) -> dict[int, Setting]:
    """Settings that came into force, by step.

    calls: of a step, as (kind, times the seconds); skips: steps whose later blocks do not run;
    breaks: the last call raises; blocks: seconds of each block, instead of equal ones.
    """
    changes: dict[int, Setting] = {}
    clock = one.steps.clock
    positions = one._positions
    for step in range(num_steps):
        changed = one.begin_step(0)
        if changed is not None:
            changes[step] = changed
        if one.times is not None:
            one.measured_steps.append(step)
        todo = list(calls(step))
        for at, (kind, share) in enumerate(todo):
            is_broken = breaks and step == num_steps - 1 and at == len(todo) - 1
            begin = clock.now
            length = share * seconds(step, one.setting, changed is not None)
            each = blocks(one.setting) if blocks else [length / len(positions)] * len(positions)
            for position, taken in zip(positions, each, strict=True):
                if position and (step in skips or is_broken):
                    break
                if one.times is not None:
                    one.times.add(position, clock.now, clock.now, clock.now + taken)
                clock.now += taken
            if one.times is not None and not is_broken:
                one.times.add_call(kind, begin, clock.now)
    one.finish()
    return changes
