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

from .device import synchronize
from .memory import LoadedModel

CAP = "slipstream_cap_bytes"  # attribute of a patcher under a budget: bytes that may be resident
_CHUNK_BYTES = 64 << 20  # of a bandwidth measurement; less where less is free
_NUM_CHUNKS = 4


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI's dynamic memory manager (VBAR) loads this MODEL."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if ask is not None else False


def unsupported(patcher: Any) -> str | None:
    """Why this MODEL cannot have a VRAM budget here, or None."""
    device = patcher.load_device
    if device.type == "cpu":
        return "the model runs on the CPU: there is no VRAM to budget"
    if device.type == "mps":
        return "this device shares its memory with the CPU: there is nothing to move"
    if device == getattr(patcher, "offload_device", None):
        return "ComfyUI was started with --highvram or --gpu-only: weights never leave the device"
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


def weight_bytes(patcher: Any) -> int:
    """Bytes of all weights, as ComfyUI counts them."""
    return int(patcher.model_size())


def placed_bytes(patcher: Any) -> int:
    """Bytes of all weights on the load device, where they may have another dtype (dynamic).

    Known once the model was loaded; before that it is what they take in RAM.
    """
    vbar = patcher._vbar_get() if is_dynamic(patcher) else None
    if vbar is None:
        return weight_bytes(patcher)
    return int(vbar.offset) + forced_bytes(patcher)


def resident_bytes(patcher: Any) -> int:
    """Bytes of weights on the load device now; a VBAR counts pages of 32 MiB."""
    return min(int(patcher.loaded_size()), placed_bytes(patcher))


def forced_bytes(patcher: Any) -> int:
    """Dynamic: bytes of the small weights that ComfyUI loads beside its VBAR; classic: 0."""
    return int(patcher.model.model_loaded_weight_memory) if is_dynamic(patcher) else 0


def pinned_bytes(patcher: Any) -> int:
    """Bytes of the model's weights in page-locked RAM."""
    if is_dynamic(patcher):
        return int(patcher.pinned_memory_size())
    total = 0
    for key in getattr(patcher, "pinned", ()):
        weight: Any = patcher.model
        for part in key.split("."):
            weight = getattr(weight, part)
        total += weight.nbytes
    return total


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

    size = max(min(_CHUNK_BYTES, reusable_bytes(device) // 4), 1 << 20)
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


def reusable_bytes(device: torch.device) -> int:
    """Free bytes that weights may take: the device's, and what torch holds but does not use."""
    import comfy.model_management as management

    return int(management.get_free_memory(device))


def reserve_bytes() -> int:
    """What ComfyUI leaves to other programs (--reserve-vram)."""
    import comfy.model_management as management

    return int(management.extra_reserved_memory())


def loaded_models(sampled: Any) -> list[LoadedModel]:
    """Every model that ComfyUI holds now, in its own order; empty without ComfyUI.

    sampled: the patcher of the run, whose model is marked.
    """
    if "comfy" not in sys.modules:
        return []
    import comfy.model_management as management

    found = []
    for entry in getattr(management, "current_loaded_models", ()):
        if entry.model is None:
            continue
        try:
            found.append(_describe(entry.model, sampled))
        except (AttributeError, KeyError):  # another pack's patcher: not worth a failed run
            continue
    return found


def _describe(patcher: Any, sampled: Any) -> LoadedModel:
    total = placed_bytes(patcher)
    is_sampled = patcher.model is sampled.model
    return LoadedModel(
        key=id(patcher.model),
        name=_name(patcher),
        kind=_kind(patcher),
        device=str(patcher.load_device),
        total_bytes=total,
        loaded_bytes=resident_bytes(patcher),
        pinned_bytes=pinned_bytes(patcher),
        is_dynamic=is_dynamic(patcher),
        on_cpu=patcher.load_device.type == "cpu",
        is_sampled=is_sampled,
        is_capped=is_sampled and getattr(sampled, CAP, None) is not None,
    )


def _name(patcher: Any) -> str:
    """The class of the network, as users know it: Flux, WanModel, AutoencoderKL, SD3ClipModel."""
    network = getattr(patcher.model, "diffusion_model", patcher.model)
    return type(network).__name__.strip("_")


def _kind(patcher: Any) -> str:
    if hasattr(patcher.model, "diffusion_model"):
        return "diffusion model"
    if getattr(patcher, "is_clip", False):
        return "text encoder"
    name = type(patcher.model).__name__.lower()
    return "VAE" if "autoencod" in name or "vae" in name or "taesd" in name else "model"


def start_flags() -> frozenset[str]:
    """The memory flags that this ComfyUI was started with."""
    if "comfy.cli_args" not in sys.modules:
        return frozenset()
    from comfy.cli_args import args

    names = ("lowvram", "novram", "disable_smart_memory", "cpu_vae", "reserve_vram")
    return frozenset("--" + n.replace("_", "-") for n in names if getattr(args, n, None))
