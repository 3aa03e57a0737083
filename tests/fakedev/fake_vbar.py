"""A stand-in for comfy-aimdo: VBARs with pages, pins, signatures and a watermark, in RAM.

Pages are 64 KiB, so that tiny models have many. Source of the behaviour: comfy-aimdo 0.4.9 as
ComfyUI 0.33 uses it. It keeps `Room.headroom_bytes` of the device free (256 MiB in src/plat.h,
here set by the check to the model's scale): a page that does not fit evicts the highest pages of
the model used longest ago, at last of its own, whose watermark goes down with them until the next
load (src/model-vbar.c). Kinder than aimdo in one thing: torch's own allocations do not evict, what
they took is missed by the next page only.
"""

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch

PAGE = 64 * 1024


class Room:
    """What is free for pages: `free` is told by the device, which counts its bytes."""

    headroom_bytes = 0
    free: ClassVar[Callable[[], int]] = staticmethod(lambda: 10**12)

    @classmethod
    def has(cls, size: int) -> bool:
        return cls.free() - size >= cls.headroom_bytes


class FakeVBAR:
    """An address range. A fault makes its pages resident, or fails above the watermark.

    made: live ones; order: their priorities, the lowest first.
    """

    made: ClassVar["weakref.WeakSet[FakeVBAR]"] = weakref.WeakSet()
    last_rank = 0
    device = torch.device("cpu")

    def __init__(self, size: int, device: int):
        self.size = int(size) // 10 + 8 * PAGE  # ComfyUI asks for ten times the model
        self.num_pages = self.size // PAGE + 1
        self.watermark = self.num_pages
        self.offset = 0
        self.pages: set[int] = set()
        self.pins: dict[int, int] = {}
        self.peak_bytes = 0
        self._serials: dict[int, int] = {}
        self._memory: torch.Tensor | None = None
        self.rank = FakeVBAR.last_rank = FakeVBAR.last_rank + 1
        FakeVBAR.made.add(self)

    @classmethod
    def evict(cls, until: Callable[[], bool]) -> None:
        """Lower the watermarks, those of the lowest priority first, until there is room."""
        for one in sorted(cls.made, key=lambda vbar: vbar.rank):
            while one.watermark > 0 and not until():
                one.watermark -= 1
                if not one.pins.get(one.watermark):
                    one.pages.discard(one.watermark)

    @classmethod
    def unbacked_bytes(cls) -> int:
        """Of the address ranges, which this device holds whole: what no page is resident in."""
        held = sum(one._memory.numel() for one in cls.made if one._memory is not None)
        return held - sum(one.loaded_size() for one in cls.made)

    def alloc(self, num_bytes: int) -> tuple["FakeVBAR", int, int]:
        offset = (self.offset + 511) & ~511
        self.offset = offset + num_bytes
        assert self.offset <= self.size
        return self, offset, num_bytes

    def fault(self, offset: int, size: int) -> bytes | None:
        span = self._span(offset, size)
        if span.stop > self.watermark:
            return None
        for page in span:
            if page not in self.pages:
                if not Room.has(PAGE):
                    self.evict(lambda page=page: Room.has(PAGE) or self.watermark <= page)
                    if page >= self.watermark:
                        return None
                self.pages.add(page)
                self._serials[page] = self._serials.get(page, 0) + 1
        for page in span:
            self.pins[page] = self.pins.get(page, 0) + 1
        self.peak_bytes = max(self.peak_bytes, self.loaded_size())
        return repr([self._serials[page] for page in span]).encode()

    def unpin(self, offset: int, size: int) -> None:
        for page in self._span(offset, size):
            self.pins[page] = max(0, self.pins.get(page, 0) - 1)
            if page >= self.watermark and not self.pins[page]:
                self.pages.discard(page)

    def prioritize(self) -> None:
        self.rank = FakeVBAR.last_rank = FakeVBAR.last_rank + 1
        self.watermark = self.num_pages

    def set_watermark(self, num_bytes: int) -> None:
        self.watermark = min(-(-int(num_bytes) // PAGE), self.num_pages)
        self.pages = {p for p in self.pages if p < self.watermark or self.pins.get(p)}

    def free_memory(self, size: float) -> int:
        before = self.loaded_size()
        for page in sorted(self.pages, reverse=True):
            if size <= 0:
                break
            if not self.pins.get(page):
                self.pages.discard(page)
                self.watermark = min(self.watermark, page)
                size -= PAGE
        return before - self.loaded_size()

    def loaded_size(self) -> int:
        return len(self.pages) * PAGE

    def num_pinned(self) -> int:
        return sum(1 for pins in self.pins.values() if pins)

    def tensor(self, offset: int, size: int) -> torch.Tensor:
        if self._memory is None:
            self._memory = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        return self._memory[offset : offset + size]

    def _span(self, offset: int, size: int) -> range:
        return range(offset // PAGE, -(-(offset + size) // PAGE))


class FakeCastBuffer:
    """The buffer of one offload stream: it only grows."""

    peak_bytes = 0
    live: ClassVar["weakref.WeakSet[FakeCastBuffer]"] = weakref.WeakSet()
    device = torch.device("cpu")

    def __init__(self, limit: int, device: int):
        self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        FakeCastBuffer.live.add(self)

    def size(self) -> int:
        return self._memory.numel()

    def get(self, size: int, offset: int = 0) -> tuple["FakeCastBuffer", int, int]:
        if size + offset > self.size():
            missing = size + offset - self.size()
            FakeVBAR.evict(lambda: Room.has(missing))
            grown = torch.empty(size + offset, dtype=torch.uint8, device=self.device)
            grown[: self.size()].copy_(self._memory)
            self._memory = grown
        held = sum(one.size() for one in FakeCastBuffer.live)
        FakeCastBuffer.peak_bytes = max(FakeCastBuffer.peak_bytes, held)
        return self, offset, size

    def tensor(self, offset: int, size: int) -> torch.Tensor:
        return self._memory[offset : offset + size]


class FakeHostBuffer:
    size = 0

    def __init__(self, *_: Any, **__: Any): ...

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = size


class FakeStream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def as_context(self, _: Any) -> Any:
        return contextlib.nullcontext()


class FakeModelMMAP:
    """A mapping that cannot be written to, and the file that streams read their slices from."""

    reads: ClassVar[list[int]] = []  # bytes of each slice that was read into device memory

    def __init__(self, path: str):
        self.file = os.open(path, os.O_RDONLY)
        self.mapping = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        self.address = numpy.frombuffer(self.mapping, numpy.uint8).ctypes.data

    def get(self) -> int:
        return self.address

    def get_file_handle(self) -> int:
        return self.file

    def bounce(self) -> bool:
        return True

    def __del__(self) -> None:
        os.close(self.file)


def read_file_to_device(
    file: int, offset: int, size: int, stream: int, address: int, device: int, mark_cold: bool
) -> None:
    """The fake device's memory is RAM."""
    content = os.pread(file, size, offset)
    assert len(content) == size
    ctypes.memmove(address, content, size)
    FakeModelMMAP.reads.append(size)


def install(device: torch.device) -> None:
    """Replace comfy-aimdo and the offload streams; `FakeVBAR.made` has the live VBARs."""
    import comfy.cli_args
    import comfy.model_management as management
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar as model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    FakeVBAR.device = FakeCastBuffer.device = device
    model_vbar.ModelVBAR = FakeVBAR
    model_vbar.vbar_fault = lambda alloc: alloc[0].fault(*alloc[1:])
    model_vbar.vbar_unpin = lambda alloc: alloc and alloc[0].unpin(*alloc[1:])
    model_vbar.vbar_signature_compare = lambda a, b: a is not None and a == b
    model_vbar.vbars_analyze = lambda device=None: sum(v.loaded_size() for v in FakeVBAR.made)
    model_vbar.vbars_reset_watermark_limits = lambda: None
    comfy_aimdo.model_mmap.ModelMMAP = FakeModelMMAP
    comfy_aimdo.host_buffer.read_file_to_device = read_file_to_device
    comfy_aimdo.host_buffer.HostBuffer = FakeHostBuffer
    comfy_aimdo.vram_buffer.VRAMBuffer = FakeCastBuffer
    comfy_aimdo.torch.aimdo_to_tensor = lambda alloc, device: alloc[0].tensor(*alloc[1:])
    streams = [FakeStream(), FakeStream()]

    def offload_stream(device: Any) -> FakeStream:
        streams.reverse()
        return streams[0]

    management.get_offload_stream = offload_stream
    management.sync_stream = lambda device, stream: None
    management.NUM_STREAMS = 2
    comfy.cli_args.args.disable_pinned_memory = True
