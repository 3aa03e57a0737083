"""Block prefetch for classic memory management: offloaded blocks are copied ahead of their use.

`Streamer` copies into a ring of block buffers on its own stream and exchanges parameters only
while their block runs; afterwards the very same Parameter objects are back. Late and out-of-order
blocks are copied when they come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from typing import Any

import torch

from .blocks import Unit, parts_of, weights_of
from .driver import BlockDriver, PrefetchError, Upcoming
from .lane import Lane, make_lane

_ALIGN = 1024  # ComfyUI aligns gathered weights alike, see memory_management.vram_aligned_size


@dataclass
class Source:
    """A weight in RAM. parts: (attribute, tensor, offset in the slot); context: to rebuild it."""

    owner: torch.nn.Module
    name: str
    weight: torch.Tensor
    parts: list[tuple[str, torch.Tensor, int]]
    context: Any


@dataclass
class UnitSources:
    """What one unit has to copy. patches: (LoRA function, offset, bytes)."""

    weights: list[Source] = field(default_factory=list)
    patches: list[tuple[Any, int, int]] = field(default_factory=list)
    size: int = 0
    num_left: int = 0  # weights of a kind that we do not know

    def reserve(self, size: int) -> int:
        offset = self.size
        self.size += -(-size // _ALIGN) * _ALIGN
        return offset


def find_sources(module: torch.nn.Module) -> UnitSources:
    """The weights of a module that lie in RAM, and the LoRA matrices that go with them.

    ComfyUI 0.33 keeps an offloaded weight on the CPU and its LoRA as `LowVramPatch` in the
    owner's weight_function and bias_function.
    """
    found = UnitSources()
    for owner, name, weight in weights_of(module):
        if weight.device.type != "cpu":
            continue
        parts, context = parts_of(weight)
        if not all(_is_plain(part) and part.is_contiguous() for _, part in parts):
            found.num_left += 1
            continue
        placed = [(attribute, part, found.reserve(part.nbytes)) for attribute, part in parts]
        found.weights.append(Source(owner, name, weight, placed, context))
        for function in getattr(owner, f"{name}_function", ()):
            if _can_prepare(function):
                size = function.memory_required()
                found.patches.append((function, found.reserve(size), size))
    return found


def _can_prepare(function: Any) -> bool:
    """Whether this is ComfyUI's LoRA function with the means to read staged matrices (0.33)."""
    names = ("memory_required", "prepare", "clear_prepared")
    if not getattr(function, "is_lowvram_patch", False):
        return False
    has_names = all(hasattr(function, name) for name in names)
    return has_names and "commit" in signature(function.prepare).parameters


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


@dataclass
class Slot:
    """One block buffer: what was copied into it, and when it may be read and overwritten."""

    buffer: torch.Tensor
    tensors: list[tuple[Source, torch.Tensor]] = field(default_factory=list)
    patches: list[tuple[Any, Any]] = field(default_factory=list)
    copied: Any = None
    computed: Any = None


class Streamer(BlockDriver):
    """Classic memory management: stages offloaded blocks ahead of their use.

    depth: blocks staged beside the running one. Device memory: at most depth + 1 buffers of the
    largest block, from the first call until `close`. Raises PrefetchError if they do not fit.
    """

    def __init__(
        self, units: Sequence[Unit], device: torch.device, *, depth: int, lane: Lane | None = None
    ):
        super().__init__(units)
        self.depth = depth
        self.sources = [find_sources(unit.module) for unit in units]
        self._streamed = [at for at, source in enumerate(self.sources) if source.size > 0]
        self._lane = lane if lane is not None else make_lane(device)
        self._staged: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._ran: set[int] = set()
        self._last = -1
        self._upcoming: Upcoming | None = None
        self._allocate(device)

    @property
    def num_left(self) -> int:
        """Weights of a kind that we do not know: ComfyUI casts them itself."""
        return sum(source.num_left for source in self.sources)

    @property
    def streamed_bytes(self) -> list[int]:
        """Bytes that each unit copies per model call."""
        return [source.size for source in self.sources]

    def _allocate(self, device: torch.device) -> None:
        count = min(self.depth + 1, len(self._streamed))
        size = max(self.streamed_bytes, default=0)
        try:
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        except torch.cuda.OutOfMemoryError:
            raise PrefetchError(
                f"no room for {count} block buffers of {size / 1e6:.0f} MB: lower vram_budget_gb "
                "or prefetch"
            ) from None
        # The allocator may hand out memory that computing still uses.
        computed = self._lane.computed()
        self._free = [Slot(buffer, computed=computed) for buffer in buffers]
        self.staged_peak_bytes = count * size

    def begin(self, upcoming: Upcoming) -> None:
        self._upcoming = upcoming
        self._ran = set()
        self._last = -1

    def before(self, at: int) -> None:
        ahead = self._ahead(at)
        for other in [one for one in self._staged if one != at and one not in ahead]:
            self._free.append(self._staged.pop(other))
        self.num_skipped += max(at - self._last - 1, 0)
        self._last = at
        for one in (at, *ahead):
            self._stage(one)
        slot = self._staged.get(at)
        if slot is not None:
            self._lane.wait_copied(slot.copied)
            _exchange(slot)
        self._ran.add(at)

    def after(self, at: int) -> None:
        if at in self._staged:
            slot = self._staged.pop(at)
            _restore(slot)
            slot.computed = self._lane.computed()
            self._free.append(slot)

    def end(self) -> None:
        self.num_skipped += len(self.units) - self._last - 1

    def close(self) -> None:
        """Give the buffers back, when no copy reads or writes any more."""
        self._lane.synchronize()
        for at in list(self._staged):
            _restore(self._staged.pop(at))
        self._free.clear()
        self.sources = []

    def _ahead(self, at: int) -> list[int]:
        """The units to stage behind `at`: those to run next, then the next call's first ones."""
        assert self._upcoming is not None
        block = self.units[at].block
        blocks, is_all = self._upcoming(block)
        blocks.add(block)
        behind = (one for one in self._streamed if one > at and self.units[one].block in blocks)
        found = list(islice(behind, self.depth))
        if is_all:  # what this call began with, the next will most likely begin with too
            again = (one for one in self._streamed if one in self._ran and one != at)
            missing = self.depth - len(found)
            found.extend(islice((one for one in again if one not in found), missing))
        return found

    def _stage(self, at: int) -> None:
        source = self.sources[at]
        if source.size == 0 or at in self._staged:
            return
        slot = self._free.pop(0)
        if slot.computed is not None:
            self._lane.wait_computed(slot.computed)
        with self._lane.copying():
            slot.tensors = [(one, _copy(one, slot.buffer)) for one in source.weights]
            slot.patches = [
                (
                    function,
                    function.prepare(
                        _cut(slot.buffer, offset, size), self._lane.stream, commit=False
                    ),
                )
                for function, offset, size in source.patches
            ]
        slot.copied = self._lane.copied()
        self._staged[at] = slot
        self.num_copies += 1


def _cut(buffer: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    return buffer[offset : offset + size]


def _copy(source: Source, buffer: torch.Tensor) -> torch.Tensor:
    copies = {}
    for attribute, part, offset in source.parts:
        view = _cut(buffer, offset, part.nbytes).view(part.dtype).view(part.shape)
        copies[attribute] = view.copy_(part, non_blocking=True)
    if source.context is None:
        return copies[""]
    weight = source.weight
    return type(weight).__tensor_unflatten__(  # type: ignore[attr-defined]
        copies, source.context, weight.size(), weight.stride()
    )


def _exchange(slot: Slot) -> None:
    """Put the staged copies in; a weight that ComfyUI has replaced since then stays its own."""
    for source, tensor in slot.tensors:
        if source.owner._parameters.get(source.name) is source.weight:
            source.owner._parameters[source.name] = tensor  # type: ignore[assignment]
    for function, prepared in slot.patches:
        function.prepared_patches = prepared


def _restore(slot: Slot) -> None:
    """Put the very same parameters back: ComfyUI's backups and pins refer to them."""
    for source, tensor in slot.tensors:
        if source.owner._parameters.get(source.name) is tensor:
            source.owner._parameters[source.name] = source.weight  # type: ignore[assignment]
    for function, _ in slot.patches:
        function.clear_prepared()
    slot.tensors, slot.patches = [], []
