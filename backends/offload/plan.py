"""The stall-aware planner: which weights stay on the device, and what a step will then take.

Pure arithmetic on block times, block sizes and copy rates: no torch, under 100 ms. Copies run one
after the other on one engine, a block computes when all its weights have arrived, and `depth` + 1
block buffers limit how far copies run ahead (event model of docs/offload.md).
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NO_STALL = 0.002  # a step within this share of pure computing counts as free of stalls
MIN_GAIN = 0.03  # below this share of a step, prefetch is not worth its buffers
SLOWER = 0.03  # a plan that makes a later step slower by more than this share is rolled back
_SAME = 1e-9  # relative difference of two times that are equal but for rounding
_PASSES = 2  # the first pass fills the buffers, the last one is a step in the steady state
_SMALL_MODULE = 64 * 1024  # ComfyUI 0.33, model_patcher.py `_load_list`: smaller ones come first


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One block: bytes of each of its modules' weights, and its computing time without copies."""

    index: int
    modules: tuple[int, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.modules)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What was measured on the device.

    pinned_rate, pageable_rate: host-to-device bytes per second; pinned_share: of the bytes that
    stream; room_bytes: device memory for this model's weights and for activations together;
    activation_bytes: peak of one step without weights; reserve_bytes: left to others.
    """

    pinned_rate: float
    pageable_rate: float
    pinned_share: float
    room_bytes: int
    activation_bytes: int
    reserve_bytes: int

    @property
    def rate(self) -> float:
        """Bytes per second of a copy whose pinned and pageable parts follow each other."""
        share = min(max(self.pinned_share, 0.0), 1.0)
        return 1.0 / (share / self.pinned_rate + (1.0 - share) / self.pageable_rate)

    @property
    def weight_bytes(self) -> int:
        """What weights and staging buffers may take."""
        return max(self.room_bytes - self.activation_bytes - self.reserve_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One model call: its time, and how much of it waits for copies."""

    seconds: float
    stall_seconds: float


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """What to keep resident, and what one model call's blocks then take.

    resident_bytes: of all weights; None: everything. resident_blocks: those to keep, where the
    memory manager lets us choose. depth: blocks staged ahead, -1: none. why: for the report.
    """

    resident_bytes: int | None
    resident_blocks: tuple[int, ...]
    depth: int
    forecast: Forecast
    why: str


def simulate(
    blocks: Sequence[BlockCost], streamed: Sequence[int], *, rate: float, depth: int
) -> Forecast:
    """One model call in the steady state.

    streamed: bytes to copy for each block (0: resident). The copy for a streamed block starts
    when the engine is free and the block `depth` + 1 streamed blocks earlier has finished.
    """
    now = engine = start = 0.0
    finished: list[float] = []
    for _ in range(_PASSES):
        start = now
        for block, size in zip(blocks, streamed, strict=True):
            if size > 0:
                gate = finished[-depth - 1] if len(finished) > depth else 0.0
                engine = max(engine, gate) + size / rate
                now = max(now, engine)
            now += block.seconds
            if size > 0:
                finished.append(now)
    computing = sum(block.seconds for block in blocks)
    return Forecast(seconds=now - start, stall_seconds=max(now - start - computing, 0.0))


def staging_bytes(streamed: Sequence[int], depth: int) -> int:
    """Device memory of the block buffers: `depth` + 1 of the largest, no more than there are."""
    sizes = [size for size in streamed if size > 0]
    return min(depth + 1, len(sizes)) * max(sizes, default=0)


def largest_first(blocks: Sequence[BlockCost], resident_bytes: int) -> list[int]:
    """Bytes that stream per block where ComfyUI places the weights itself: small, then largest."""
    modules = [(size, at) for at, block in enumerate(blocks) for size in block.modules]
    modules.sort(key=lambda module: (module[0] >= _SMALL_MODULE, -module[0]))
    streamed = [block.bytes for block in blocks]
    room = resident_bytes
    for size, at in modules:
        if size <= room:
            room -= size
            streamed[at] -= size
    return streamed


def residency_order(blocks: Sequence[BlockCost], *, rate: float, depth: int) -> list[int]:
    """Positions of the blocks in the order to make them resident: most stall removed per byte.

    Lazy greedy: a gain seldom grows when another block became resident, so only the candidate
    that looked best is evaluated again. Blocks that no longer gain anything follow in order.
    """
    streamed = [block.bytes for block in blocks]
    current = simulate(blocks, streamed, rate=rate, depth=depth).seconds
    computing = sum(block.seconds for block in blocks)

    def gain(at: int) -> float:
        size, streamed[at] = streamed[at], 0
        without = simulate(blocks, streamed, rate=rate, depth=depth).seconds
        streamed[at] = size
        return (current - without) / max(size, 1)

    order: list[int] = []
    heap = [(-gain(at), at) for at, size in enumerate(streamed) if size > 0]
    heapq.heapify(heap)
    while heap and current > computing * (1 + NO_STALL):
        _, at = heapq.heappop(heap)
        best = gain(at)
        if heap and best < -heap[0][0]:
            heapq.heappush(heap, (-best, at))
            continue
        order.append(at)
        current -= best * streamed[at]
        streamed[at] = 0
    rest = set(range(len(blocks))) - set(order)
    return order + sorted(rest)


def all_resident(blocks: Sequence[BlockCost]) -> OffloadPlan:
    """The plan of a model whose weights are all on the device: nothing is copied."""
    seconds = sum(block.seconds for block in blocks)
    return OffloadPlan(
        resident_bytes=None,
        resident_blocks=tuple(block.index for block in blocks),
        depth=-1,
        forecast=Forecast(seconds=seconds, stall_seconds=0.0),
        why="all weights fit: offload gains nothing here, off is as fast",
    )


def make_plan(
    blocks: Sequence[BlockCost],
    facts: DeviceFacts,
    *,
    depth: int,
    smallest: bool = False,
    can_choose: bool = False,
    budget_bytes: int | None = None,
    other_bytes: int = 0,
) -> OffloadPlan:
    """The residency for one model call's blocks.

    smallest: stop where no stall is predicted, else fill the room; can_choose: the memory manager
    takes our choice of blocks, else it places modules by size; budget_bytes: upper bound for
    weights and staging buffers; other_bytes: weights outside the blocks, which come first.
    """
    room = facts.weight_bytes if budget_bytes is None else min(facts.weight_bytes, budget_bytes)
    total = other_bytes + sum(block.bytes for block in blocks)
    if total <= room and not smallest:
        return all_resident(blocks)
    propose = _choose_blocks if can_choose else _choose_cap
    return propose(blocks, facts.rate, max(depth, 0), smallest, room, other_bytes)


def _choose_blocks(
    blocks: Sequence[BlockCost], rate: float, depth: int, smallest: bool, room: int, other: int
) -> OffloadPlan:
    order = residency_order(blocks, rate=rate, depth=depth)

    def placed(count: int) -> tuple[int, list[int]]:
        kept = set(order[:count])
        streamed = [0 if at in kept else block.bytes for at, block in enumerate(blocks)]
        return other + sum(blocks[at].bytes for at in kept), streamed

    return _best(blocks, placed, len(order), rate, depth, smallest, room, order)


def _choose_cap(
    blocks: Sequence[BlockCost], rate: float, depth: int, smallest: bool, room: int, other: int
) -> OffloadPlan:
    total = sum(block.bytes for block in blocks)
    num_caps = 64

    def placed(count: int) -> tuple[int, list[int]]:
        cap = total * count // num_caps
        return other + cap, largest_first(blocks, cap)

    return _best(blocks, placed, num_caps, rate, depth, smallest, room, None)


def _best(
    blocks: Sequence[BlockCost],
    placed: Callable[[int], tuple[int, list[int]]],
    num_choices: int,
    rate: float,
    depth: int,
    smallest: bool,
    room: int,
    order: list[int] | None,
) -> OffloadPlan:
    """The fastest choice of 0 .. num_choices that fits `room`; as fast: the one most resident.

    smallest: the first one that is free of stalls instead. The choices do not depend on the room,
    so that more room is never slower.
    """
    enough = sum(block.seconds for block in blocks) * (1 + NO_STALL)
    best, least = 0, float("inf")
    for count in range(num_choices + 1):
        resident, streamed = placed(count)
        if resident + staging_bytes(streamed, depth) > room and count > 0:
            continue
        seconds = simulate(blocks, streamed, rate=rate, depth=depth).seconds
        if seconds <= least * (1 + _SAME):
            best, least = count, min(seconds, least)
        if smallest and seconds <= enough:
            best = count
            break
    resident, streamed = placed(best)
    forecast = simulate(blocks, streamed, rate=rate, depth=depth)
    kept = order[:best] if order is not None else []
    return OffloadPlan(
        resident_bytes=resident,
        resident_blocks=tuple(sorted(blocks[at].index for at in kept)),
        depth=depth,
        forecast=forecast,
        why=_why(forecast, sum(streamed), rate),
    )


def _why(forecast: Forecast, streamed: int, rate: float) -> str:
    if forecast.stall_seconds <= NO_STALL * forecast.seconds:
        return "copies hide behind computing"
    share = forecast.stall_seconds / forecast.seconds
    return (
        f"copying {streamed / 1e9:.1f} GB at {rate / 1e9:.1f} GB/s takes longer than computing: "
        f"{share:.0%} of a call waits"
    )
