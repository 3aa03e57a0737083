"""What offload asks of ComfyUI's memory managers, and every private name it uses, probed.

Classic: `ModelPatcher.partially_load` moves modules, the rest is cast per use. Dynamic: a VBAR
(address range of comfy-aimdo) whose watermark caps what may be resident. Facts hold for ComfyUI
0.33; a name that is missing makes `unsupported` or `prefetch_unsupported` say so. Names of
comfy.* are imported when called.
"""

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..host import free_memory
from ..memory.counters import synchronize
from ..memory.host import forced_bytes, is_dynamic, resident_bytes, weight_bytes
from .blocks import parts_of

AIMDO_HEADROOM = 256 << 20  # comfy-aimdo evicts until as much is free (src/plat.h)
_CHUNK_BYTES = 64 << 20  # of a bandwidth measurement; less where less is free
_NUM_CHUNKS = 4


def no_vram(patcher: Any) -> str | None:
    """Why there is no VRAM to budget on this machine, or None."""
    device = patcher.load_device
    if device.type == "cpu":
        return "the model runs on the CPU: there is no VRAM to budget"
    if device.type == "mps":
        return "this device shares its memory with the CPU: there is nothing to move"
    if device == getattr(patcher, "offload_device", None):
        return "ComfyUI was started with --highvram or --gpu-only: weights never leave the device"
    return None


def unsupported(patcher: Any) -> str | None:
    """Why this MODEL cannot have a VRAM budget here, or None."""
    reason = no_vram(patcher)
    if reason is not None:
        return reason
    if is_dynamic(patcher):
        vbar_names = ("set_watermark", "prioritize", "loaded_size")
        vbar_class = _vbar_class()
        if not hasattr(patcher, "_vbar_get"):
            return "this ComfyUI has no _vbar_get on its dynamic model patcher"
        missing = [name for name in vbar_names if not hasattr(vbar_class, name)]
        return f"this comfy-aimdo has no {missing[0]} on its VBAR" if missing else None
    names = ("partially_load", "partially_unload", "model_size", "loaded_size")
    missing = [name for name in names if not hasattr(patcher, name)]
    if missing:
        return f"this ComfyUI has no {missing[0]} on its model patcher"
    if not hasattr(patcher.model, "model_loaded_weight_memory"):
        return "this ComfyUI has no model_loaded_weight_memory on its models"
    return None


def prefetch_unsupported(patcher: Any) -> str | None:
    """Why blocks of this MODEL cannot be staged ahead, or None. Asks nothing about the budget."""
    if not is_dynamic(patcher):
        return None
    try:
        import comfy.model_prefetch as prefetch
    except ImportError:
        return "this ComfyUI has no comfy.model_prefetch"
    for name in ("make_prefetch_queue", "prefetch_queue_pop"):
        if not hasattr(prefetch, name):
            return f"this ComfyUI has no comfy.model_prefetch.{name}"
    if num_offload_streams() == 0:
        return "ComfyUI runs without offload streams (--disable-async-offload)"
    return None


def _vbar_class() -> Any:
    try:
        import comfy_aimdo.model_vbar as model_vbar
    except ImportError:
        return None
    return getattr(model_vbar, "ModelVBAR", None)


def num_offload_streams() -> int:
    """Streams of ComfyUI's asynchronous offload; 0 without."""
    if "comfy" not in sys.modules:
        return 0
    import comfy.model_management as management

    return int(getattr(management, "NUM_STREAMS", 0))


def cast_buffer_bytes() -> int:
    """Device memory of the buffers that ComfyUI streams through; held until the node ends."""
    import comfy.model_management as management

    classic = getattr(management, "STREAM_CAST_BUFFERS", {}).values()
    dynamic = getattr(management, "STREAM_AIMDO_CAST_BUFFERS", {}).values()
    return sum(b.nbytes for b in classic) + sum(int(b.size()) for b in dynamic)


def release_cast_buffers(device: torch.device) -> None:
    """Give back the buffers that ComfyUI streams through; the next copy makes new ones, as large
    as it needs. Between two model calls: nothing may be staged."""
    import comfy.model_management as management

    buffers = getattr(management, "STREAM_AIMDO_CAST_BUFFERS", {})
    for stream in buffers:
        if stream is not None:
            stream.synchronize()
    synchronize(device)
    buffers.clear()


def cap_watermark(patcher: Any, resident: int) -> None:
    """Dynamic: at most `resident` bytes of weights, from now until the model is loaded again.

    The watermark is a hard cap (pages above are freed); `prioritize` in ComfyUI's load resets it.
    """
    vbar = patcher._vbar_get()
    if vbar is not None:
        vbar.set_watermark(max(int(resident) - forced_bytes(patcher), 0))


def change_residency(patcher: Any, resident: int | None) -> None:
    """Move to `resident` bytes (None: all) between two model calls, by ComfyUI's own means."""
    if is_dynamic(patcher):
        vbar = patcher._vbar_get()
        if vbar is not None:
            vbar.prioritize()
            if resident is not None:
                cap_watermark(patcher, resident)
        return
    target = weight_bytes(patcher) if resident is None else resident
    missing = target - resident_bytes(patcher)
    if missing < 0:
        patcher.partially_unload(patcher.offload_device, -missing)
    elif missing > 0:
        patcher.partially_load(patcher.load_device, extra_memory=missing)


def has_weight_hooks(patcher: Any) -> bool:
    """Whether hooks patch weights while sampling: a copy made before a patch would be stale."""
    return bool(getattr(patcher, "hook_patches", None))


def lora_rounds_by_residency(patcher: Any) -> bool:
    """Whether a LoRA is on weights of fewer than 32 bits: ComfyUI merges it into resident ones,
    and rounds them again, but adds it to streamed ones when they are used."""
    patched = getattr(patcher, "patches", None) or ()
    modules = dict(patcher.model.named_modules()) if patched else {}
    for key in patched:
        path, _, name = key.rpartition(".")
        weight = getattr(modules.get(path), name, None)
        if not isinstance(weight, torch.Tensor):
            continue
        # Dynamic memory keeps the file's dtype in RAM and casts to this one on the device.
        placed = getattr(modules[path], f"{name}_comfy_model_dtype", None)
        dtypes = [part.dtype for _, part in parts_of(weight)[0]]
        if any(dtype.itemsize < 4 for dtype in (*dtypes, *([placed] if placed else []))):
            return True
    return False


def chooses_modules(patcher: Any) -> bool:
    """Whether the order in which ComfyUI loads this MODEL's modules can be told (classic)."""
    return not is_dynamic(patcher) and hasattr(patcher, "_load_list")


class PrefetchQueue:
    """ComfyUI's block queue for one model call, kept in line with the blocks that really run.

    A pop stages the block about to run, and frees what the one before it had staged. A queue that
    is popped for another block than its next hands stale weights to the wrong one, silently
    (measured: 13 to 14 % relative error), so entries of skipped blocks are dropped first.
    Source: ComfyUI 0.33, comfy/model_prefetch.py.
    """

    def __init__(self, queue: list[Any], device: torch.device):
        self._queue = queue
        self._device = device
        self.num_dropped = 0

    @classmethod
    def make(
        cls, blocks: Sequence[torch.nn.Module], device: torch.device
    ) -> "PrefetchQueue | None":
        """A queue over `blocks`, or None where ComfyUI makes none for this device."""
        from comfy.model_prefetch import make_prefetch_queue

        queue = make_prefetch_queue(list(blocks), device, {"prefetch_dynamic_vbars": True})
        return None if queue is None else cls(queue, device)

    def advance(self, block: torch.nn.Module) -> None:
        """Stage `block`, which runs next; blocks before it in the queue are dropped."""
        index = next((i for i, e in enumerate(self._queue) if i > 0 and e is block), None)
        if index is None:  # runs twice or out of order
            self._queue.insert(1, block)
            index = 1
        self.num_dropped += index - 1
        del self._queue[1:index]
        self._pop(block)

    def finish(self) -> None:
        """Free what the last block had staged, also after an exception."""
        self.num_dropped += max(len(self._queue) - 2, 0)
        del self._queue[1:-1]
        if len(self._queue) > 1:
            self._pop(None)

    def _pop(self, block: torch.nn.Module | None) -> None:
        from comfy.model_prefetch import prefetch_queue_pop

        prefetch_queue_pop(self._queue, self._device, block)


@functools.cache
def copy_rates(device: torch.device) -> tuple[float, float]:
    """Measured host-to-device bytes per second from pinned and from pageable memory.

    Pins with ComfyUI's own functions; where they refuse, both rates are the pageable one. Takes
    about 0.2 s, once per process and device.
    """
    import comfy.model_management as management

    size = max(min(_CHUNK_BYTES, free_memory(device) // 4), 1 << 20)
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    pageable = _copy_rate(source, target)
    if not management.pin_memory(source):
        return pageable, pageable
    try:
        return _copy_rate(source, target), pageable
    finally:
        management.unpin_memory(source)


def _copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    target.copy_(source, non_blocking=True)
    synchronize(target.device)
    start = time.perf_counter()
    for _ in range(_NUM_CHUNKS):
        target.copy_(source, non_blocking=True)
    synchronize(target.device)
    return _NUM_CHUNKS * source.nbytes / max(time.perf_counter() - start, 1e-9)
