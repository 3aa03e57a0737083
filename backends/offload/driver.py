"""Hooks on the blocks of one model call: to take times, or to drive ComfyUI's own block queue.

A driver lives for one run. Its hooks exist for one model call, work for skipped, repeated and
reordered blocks, and are gone when the call ends, however it ends.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..compiler import unrecorded
from ..errors import SlipstreamError
from . import host
from .blocks import Unit, hooks
from .timing import BlockTimes

# Behind one block: the blocks that are sure to run in this call, and whether that is all of them.
Upcoming = Callable[[int], tuple[set[int], bool]]


class PrefetchError(SlipstreamError, RuntimeError):
    """Prefetch is impossible here; the message says why. Sampling goes on without it."""


class BlockDriver:
    """Hooks the units for one model call; by itself it only takes times."""

    depth = -1
    staged_peak_bytes = 0
    num_copies = 0
    num_skipped = 0
    refusal: str | None = None

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)
        self._times: BlockTimes | None = None

    @contextmanager
    def call(
        self, upcoming: Upcoming, times: BlockTimes | None, kind: Hashable = None
    ) -> Iterator[None]:
        """The scope of one model call.

        times: where to write what it and the units took, if anywhere; kind: see BlockTimes.
        """
        self._times = times
        begin = times.clock.mark() if times else None
        self.begin(upcoming)
        try:
            with hooks(self.units, self._around):
                yield
        finally:
            self._times = None
            self.end()
        if times:
            times.add_call(kind, begin, times.clock.mark())

    @contextmanager
    def _around(self, at: int) -> Iterator[None]:
        times = self._times
        begin = times.clock.mark() if times else None
        with unrecorded():
            self.before(at)
        try:
            ready = times.clock.mark() if times else None
            yield
        finally:
            with unrecorded():
                self.after(at)
        if times:
            times.add(at, begin, ready, times.clock.mark())

    def begin(self, upcoming: Upcoming) -> None: ...

    def before(self, at: int) -> None: ...

    def after(self, at: int) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class QueueDriver(BlockDriver):
    """Dynamic memory management: ComfyUI's block queue, one per model call."""

    def __init__(self, units: Sequence[Unit], device: torch.device):
        super().__init__(units)
        self.depth = max(host.num_offload_streams() - 1, 1)
        self._device = device
        self._queue: host.PrefetchQueue | None = None

    def begin(self, upcoming: Upcoming) -> None:
        self._queue = host.PrefetchQueue.make([unit.module for unit in self.units], self._device)
        if self._queue is None:
            self.refusal = "ComfyUI makes no prefetch queue for this device"

    def before(self, at: int) -> None:
        if self._queue is not None:
            self._queue.advance(self.units[at].module)
            self.num_copies += 1

    def end(self) -> None:
        if self._queue is not None:
            self._queue.finish()
            self.num_skipped += self._queue.num_dropped
            self.staged_peak_bytes = max(self.staged_peak_bytes, host.cast_buffer_bytes())
            self._queue = None
