"""What a step took, what streams, and the plan that follows: numbers for plan.py.

Only reads. The caller says when the device has been waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import device as counters
from . import host
from .blocks import Unit, module_sizes, parts_of, weights_of
from .config import OffloadConfig
from .plan import (
    BlockCost,
    DeviceFacts,
    OffloadPlan,
    largest_first,
    make_plan,
    simulate,
)
from .timing import DeviceClock, UnitTime


@dataclass
class StepTimes:
    """Seconds of every step that has begun, on the device's clock."""

    clock: DeviceClock
    marks: list[Any] = field(default_factory=list)

    def mark(self) -> None:
        self.marks.append(self.clock.mark())

    def seconds(self, step: int) -> float:
        """Of one finished step; the caller has synchronized the device."""
        return self.clock.seconds(self.marks[step], self.marks[step + 1])

    def mean(self, first: int) -> float | None:
        """Of all finished steps from `first` on, or of the last one; None before any."""
        finished = range(len(self.marks) - 1)
        if not finished:
            return None
        steps = [step for step in finished if step >= first] or [finished[-1]]
        return sum(self.seconds(step) for step in steps) / len(steps)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measured step: its seconds, its model calls, its units, its activations."""

    step_seconds: float
    num_calls: int
    units: dict[int, UnitTime]
    activation_bytes: int
    is_staged: bool  # blocks computed with all their weights at hand

    def around_blocks(self) -> float:
        """Seconds of the step outside the blocks: samplers, embedders, the final layer."""
        inside = sum(unit.waiting + unit.computing for unit in self.units.values())
        return max(self.step_seconds - self.num_calls * inside, 0.0)


def streamed_bytes(units: Sequence[Unit], patcher: Any) -> list[int]:
    """Bytes of each unit that are not resident now. Dynamic: as ComfyUI places them by size."""
    if host.is_dynamic(patcher):
        costs = [BlockCost(index=0, modules=module_sizes(u.module), seconds=0.0) for u in units]
        in_blocks = sum(cost.bytes for cost in costs)
        missing = host.weight_bytes(patcher) - host.resident_bytes(patcher)
        return largest_first(costs, max(in_blocks - max(missing, 0), 0))
    return [
        sum(
            part.nbytes
            for _, _, weight in weights_of(unit.module)
            if weight.device.type == "cpu"
            for _, part in parts_of(weight)[0]
        )
        for unit in units
    ]


def block_costs(
    units: Sequence[Unit], measured: Measured, streamed: Sequence[int], rate: float
) -> list[BlockCost]:
    """Each unit's computing time without copies.

    Measured where its weights were at hand. Else ComfyUI copied its modules between their
    computing: the copies' own time is taken off, which gives the least that computing can be.
    """
    costs = []
    for at, unit in enumerate(units):
        time = measured.units.get(at, UnitTime(0.0, 0.0))
        copying = 0.0 if measured.is_staged else streamed[at] / rate
        costs.append(
            BlockCost(
                index=unit.block,
                modules=module_sizes(unit.module),
                seconds=max(time.computing - copying, 0.0),
            )
        )
    return costs


def device_facts(
    patcher: Any, measured: Measured, buffers: int, streamed: Sequence[int]
) -> DeviceFacts:
    """Copy rates and room now, between two steps, with all conditioning on the device."""
    pinned, pageable = host.copy_rates(patcher.load_device)
    resident = host.resident_bytes(patcher)
    return DeviceFacts(
        pinned_rate=pinned,
        pageable_rate=pageable,
        pinned_share=min(host.pinned_bytes(patcher) / max(sum(streamed), 1), 1.0),
        room_bytes=host.reusable_bytes(patcher.load_device) + resident + buffers,
        activation_bytes=measured.activation_bytes,
        reserve_bytes=host.reserve_bytes(),
    )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan and the steps it leads to.

    step_seconds: under the plan; unchanged_seconds: with prefetch at the residency of now;
    prefetch_gain: the most that prefetch alone can save, as a share of the measured step; is_short:
    the device cannot hold what is resident now beside activations and ComfyUI's reserve.
    """

    plan: OffloadPlan
    step_seconds: float
    unchanged_seconds: float
    prefetch_gain: float
    is_short: bool


def propose(
    patcher: Any, units: Sequence[Unit], measured: Measured, config: OffloadConfig, buffers: int
) -> Proposal:
    """The plan for the rest of the run, from the measured step."""
    streamed = streamed_bytes(units, patcher)
    facts = device_facts(patcher, measured, buffers, streamed)
    costs = block_costs(units, measured, streamed, facts.rate)
    total = host.weight_bytes(patcher)
    depth = max(config.depth(len({unit.block for unit in units})), 0)
    plan = make_plan(
        costs,
        facts,
        depth=depth,
        smallest=config.mode == "memory",
        can_choose=host.chooses_modules(patcher),
        budget_bytes=config.budget_bytes,
        other_bytes=max(total - sum(cost.bytes for cost in costs), 0),
    )
    now = simulate(costs, streamed, rate=facts.rate, depth=depth).seconds
    outside, calls = measured.around_blocks(), measured.num_calls
    unchanged = outside + calls * now
    return Proposal(
        plan=plan,
        step_seconds=outside + calls * plan.forecast.seconds,
        unchanged_seconds=unchanged,
        prefetch_gain=max(1.0 - unchanged / max(measured.step_seconds, 1e-9), 0.0),
        is_short=host.resident_bytes(patcher) + buffers > facts.weight_bytes,
    )


def activation_bytes(device: torch.device, allocated_before: int) -> int:
    """Peak of torch's tensors since the counters were reset, above what was there before."""
    return max(counters.allocated_bytes(device)[1] - allocated_before, 0)
