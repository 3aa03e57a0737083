"""The accelerator's own memory counters, through torch; None or zeros where it has none."""

from typing import Any

import torch


def _api(device: torch.device) -> Any:
    """torch.cuda (also ROCm), torch.xpu, ...; None for the CPU and for unregistered devices."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def synchronize(device: torch.device) -> None:
    """Wait for the device; returns at once where nothing is asynchronous."""
    api = _api(device)
    if hasattr(api, "synchronize"):
        api.synchronize(device) if device.type in ("cuda", "xpu") else api.synchronize()


def free_and_total(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of the device, other programs' use included; None if it cannot say.

    Pages of ComfyUI's dynamic memory count here, and nowhere in torch's own statistics.
    """
    api = _api(device)
    if not hasattr(api, "mem_get_info"):
        return None
    free, total = api.mem_get_info(device)
    return int(free), int(total)


def allocated_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes in torch's tensors now, and their peak since `reset_peak`; zeros if unknown."""
    api = _api(device)
    if not hasattr(api, "max_memory_allocated"):
        return 0, 0
    return int(api.memory_allocated(device)), int(api.max_memory_allocated(device))


def reserved_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes that torch took from the device, used or not: now, and the peak; zeros if unknown."""
    api = _api(device)
    if not hasattr(api, "max_memory_reserved"):
        return 0, 0
    return int(api.memory_reserved(device)), int(api.max_memory_reserved(device))


def reset_peak(device: torch.device) -> None:
    """Start torch's peak counters of the device anew."""
    api = _api(device)
    if hasattr(api, "reset_peak_memory_stats"):
        api.reset_peak_memory_stats(device)


def used_peak(device: torch.device) -> int | None:
    """Device memory in use: now, or at torch's peak since `reset_peak` if that was more."""
    counted = free_and_total(device)
    if counted is None:
        return None
    free, total = counted
    reserved, reserved_peak = reserved_bytes(device)
    return min(total, total - free + max(reserved_peak - reserved, 0))
