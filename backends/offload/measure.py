"""What a step took, what streams, and the plan that follows: numbers for plan.py.

Only reads. The caller says when the device has been waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..host import free_memory
from ..memory import counters
from ..memory import host as memory
from . import host
from .blocks import Unit, module_sizes, parts_of, weights_of
from .config import OffloadConfig
from .plan import (
    BlockCost,
    DeviceFacts,
    OffloadPlan,
    all_resident,
    largest_first,
    make_plan,
    simulate,
    staging_bytes,
)
from .timing import DeviceClock, UnitTime, Work


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
    """The measured step: its seconds, its model calls, its units, its activations.

    call_seconds: mean of its model calls; is_staged: blocks had all their weights at hand.
    """

    step_seconds: float
    num_calls: int
    call_seconds: float
    work: Work
    units: dict[int, UnitTime]
    activation_bytes: int
    is_staged: bool

    def around_blocks(self) -> float:
        """Seconds of the step outside the blocks: samplers, embedders, the final layer."""
        inside = sum(unit.waiting + unit.computing for unit in self.units.values())
        return max(self.step_seconds - self.num_calls * inside, 0.0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Weights of the units in bytes on the device, where they may have another dtype than in RAM.

    modules: of each unit; streamed: bytes of each unit that are not resident now; total: of all
    weights; per_copied: bytes on the device per byte copied.
    """

    modules: list[tuple[int, ...]]
    streamed: list[int]
    total: int
    per_copied: float


def sizes(units: Sequence[Unit], patcher: Any) -> Sizes:
    """What the units hold now. Dynamic: as ComfyUI's order by size places them."""
    total = memory.placed_bytes(patcher)
    scale = total / max(memory.weight_bytes(patcher), 1)
    modules = [tuple(round(size * scale) for size in module_sizes(unit.module)) for unit in units]
    if memory.is_dynamic(patcher):
        costs = [BlockCost(index=0, modules=one, seconds=0.0) for one in modules]
        missing = total - memory.resident_bytes(patcher)
        in_units = sum(cost.bytes for cost in costs)
        streamed = largest_first(costs, max(in_units - missing, 0))
    else:
        streamed = [round(_bytes_in_ram(unit.module) * scale) for unit in units]
    return Sizes(modules=modules, streamed=streamed, total=total, per_copied=scale)


def _bytes_in_ram(module: torch.nn.Module) -> int:
    weights = (weight for _, _, weight in weights_of(module) if weight.device.type == "cpu")
    return sum(part.nbytes for weight in weights for _, part in parts_of(weight)[0])


def block_costs(
    units: Sequence[Unit], measured: Measured, held: Sizes, rate: float
) -> list[BlockCost]:
    """Each unit's computing time without copies.

    Measured where its weights were at hand. Else ComfyUI copied its modules between their
    computing: the copies' own time is taken off, which gives the least that computing can be.
    """
    costs = []
    for at, unit in enumerate(units):
        time = measured.units.get(at, UnitTime(0.0, 0.0))
        copying = 0.0 if measured.is_staged else held.streamed[at] / rate
        seconds = max(time.computing - copying, 0.0)
        costs.append(BlockCost(index=unit.block, modules=held.modules[at], seconds=seconds))
    return costs


def room_bytes(patcher: Any, buffers: int) -> int:
    """Device memory for weights and activations now, with all conditioning on the device."""
    free = free_memory(patcher.load_device)
    return free + memory.resident_bytes(patcher) + buffers


def device_facts(patcher: Any, measured: Measured, room: int, held: Sizes) -> DeviceFacts:
    """Copy rates and room, between two steps."""
    pinned_rate, pageable_rate = host.copy_rates(patcher.load_device)
    missing = max(sum(held.streamed), 1)
    return DeviceFacts(
        pinned_rate=pinned_rate * held.per_copied,
        pageable_rate=pageable_rate * held.per_copied,
        pinned_share=min(memory.pinned_bytes(patcher) * held.per_copied / missing, 1.0),
        room_bytes=room,
        activation_bytes=measured.activation_bytes,
        reserve_bytes=memory.reserve_bytes(),
    )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan and the steps it leads to.

    step_seconds: under the plan; unchanged_seconds: with prefetch at the residency of now, or with
    what dynamic memory leaves of it beside the buffers; prefetch_gain: the most that prefetch can
    save, as a share of the measured step; is_short: the device cannot hold what is resident now
    beside activations and ComfyUI's reserve; needs_room: block buffers only fit if fewer weights
    stay, as the plan has it; can_stage: they do fit then; fits_bytes: weights that fit beside
    activations and reserve; copy_rates: pinned and pageable bytes per second, None where nothing
    has to be copied.
    """

    plan: OffloadPlan
    step_seconds: float
    unchanged_seconds: float
    prefetch_gain: float
    is_short: bool
    needs_room: bool = False
    can_stage: bool = True
    fits_bytes: int = 0
    copy_rates: tuple[float, float] | None = None


def propose(
    patcher: Any, units: Sequence[Unit], measured: Measured, config: OffloadConfig, buffers: int
) -> Proposal:
    """The plan for the rest of the run, from the measured step."""
    held = sizes(units, patcher)
    room, resident = room_bytes(patcher, buffers), memory.resident_bytes(patcher)
    usable = room - measured.activation_bytes - memory.reserve_bytes()
    # Dynamic memory evicts by itself, 256 MiB before the device is full: by ComfyUI's larger
    # reserve (400 MiB and more) every model that does not fit would seem to leave too little.
    evicts = memory.is_dynamic(patcher)
    is_short = (config.mode == "memory" or not evicts) and resident + buffers > usable
    if config.mode != "memory" and not is_short and not any(held.streamed):
        return _nothing_to_gain(units, measured, held)
    facts = device_facts(patcher, measured, room, held)
    costs = block_costs(units, measured, held, facts.rate)
    depth = max(config.depth(len({unit.block for unit in units})), 0)
    plan = make_plan(
        costs,
        facts,
        depth=depth,
        smallest=config.mode == "memory",
        can_choose=host.chooses_modules(patcher),
        budget_bytes=config.budget_bytes,
        other_bytes=max(held.total - sum(cost.bytes for cost in costs), 0),
    )
    holds = usable
    if evicts:  # until so little is free; ComfyUI's own buffers become those of blocks
        holds = room + host.cast_buffer_bytes() - measured.activation_bytes - host.AIMDO_HEADROOM
    staged = max(staging_bytes(held.streamed, depth), buffers)
    excess = max(resident + staged - min(holds, config.budget_bytes or holds), 0)
    streamed = _with_less(costs, held, excess) if evicts and excess else held.streamed
    now = simulate(costs, streamed, rate=facts.rate, depth=depth).seconds
    outside, calls = measured.around_blocks(), measured.num_calls
    unchanged, planned = outside + calls * now, outside + calls * plan.forecast.seconds
    needs_room = excess > 0 and not evicts
    expected = planned if needs_room else unchanged
    at_most = staging_bytes([cost.bytes for cost in costs], depth)
    fits = (plan.resident_bytes or 0) + at_most <= min(holds, config.budget_bytes or holds)
    return Proposal(
        plan=plan,
        step_seconds=planned,
        unchanged_seconds=unchanged,
        prefetch_gain=max(1.0 - expected / max(measured.step_seconds, 1e-9), 0.0),
        is_short=is_short,
        needs_room=needs_room,
        can_stage=fits or not needs_room,
        fits_bytes=max(usable, 0),
        copy_rates=host.copy_rates(patcher.load_device),
    )


def _with_less(costs: Sequence[BlockCost], held: Sizes, less: int) -> list[int]:
    """What streams per block when `less` bytes fewer stay, by ComfyUI's order by size."""
    stay = sum(cost.bytes for cost in costs) - sum(held.streamed) - less
    return largest_first(costs, max(stay, 0))


def _nothing_to_gain(units: Sequence[Unit], measured: Measured, held: Sizes) -> Proposal:
    """Everything is on the device and has room: no rate has to be measured."""
    return Proposal(
        plan=all_resident(block_costs(units, measured, held, 1.0)),
        step_seconds=measured.step_seconds,
        unchanged_seconds=measured.step_seconds,
        prefetch_gain=0.0,
        is_short=False,
    )


def activation_bytes(device: torch.device, allocated_before: int) -> int:
    """Peak of torch's tensors since the counters were reset, above what was there before."""
    return max(counters.allocated_bytes(device)[1] - allocated_before, 0)
