"""How comfy-kitchen's SVDQuant functions are reached: through its registry, or directly.

ComfyUI switches the registry's cuda backend off under torch builds older than CUDA 13, and a call
through the registry would then unpack in plain torch. comfy-kitchen's own SVDQuant layout
(tensor/svdquant_w4a4.py, 0.2.31 to 0.2.40) calls the compiled functions past the registry; so do
we, by its rules, and only what has passed a check against `reference` is used (measure.py).
"""

import ctypes
import functools
import os
import sys
from types import ModuleType
from typing import Any

import torch

NEEDED = {
    "int4": ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"),
    "awq": ("gemv_awq_w4a16",),
    "nvfp4": ("quantize_nvfp4", "scaled_mm_nvfp4"),
}
OPS = (*NEEDED["int4"], *NEEDED["awq"])
SWITCH = "COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA"  # comfy-kitchen's own; set to 0: never directly
_FALSE = ("0", "false", "no", "off")
_CUDA = (13, 0)  # what its wheels are compiled for; the driver must know it
_PIP = "pip install --upgrade comfy-kitchen"


def unavailable() -> str | None:
    """Why comfy-kitchen cannot be used at all."""
    try:
        import comfy_kitchen
    except Exception as error:  # noqa: BLE001 - a wheel for another torch raises anything
        return f"comfy-kitchen cannot be imported ({error}): {_PIP}"
    missing = [name for name in OPS if not hasattr(comfy_kitchen, name)]
    if missing:
        version = getattr(comfy_kitchen, "__version__", "this version")
        return f"comfy-kitchen {version} lacks {missing[0]}; 0.2.31 or newer has it: {_PIP}"
    return None


def functions(device: torch.device) -> Any:
    """What has the functions of OPS for tensors of `device`: the package, or its cuda module."""
    import comfy_kitchen

    registry = getattr(comfy_kitchen, "registry", None)
    if device.type != "cuda" or torch.version.hip is not None or registry is None:
        return comfy_kitchen
    if registry.is_available("cuda") or not_direct(OPS) is not None:
        return comfy_kitchen
    return _cuda_module()


def switched_off(backend: str, precision: str) -> str | None:
    """Why comfy-kitchen would fall back to plain torch on a GPU, which is slow; None if not."""
    if unavailable() is not None:
        return None  # it says so itself
    import comfy_kitchen

    status = comfy_kitchen.list_backends().get(backend, {})
    if not status.get("available"):
        return f"comfy-kitchen has no {backend} kernels here ({status.get('unavailable_reason')})"
    ops = NEEDED[precision]
    if status.get("disabled"):
        if backend != "cuda" or precision == "nvfp4":
            return f"comfy-kitchen's {backend} kernels are switched off by ComfyUI: {_advice()}"
        reason = not_direct(ops)
        return None if reason is None else f"{reason}: {_advice()}"
    # RDNA 2 has the hip backend without its matrix kernels; nvfp4 needs cuBLASLt.
    capabilities = status.get("capabilities")
    missing = [op for op in ops if capabilities is not None and op not in capabilities]
    if missing:
        return f"comfy-kitchen's {backend} kernels on this GPU have no {missing[0]}"
    return None


def not_direct(ops: tuple[str, ...]) -> str | None:
    """Why the compiled functions cannot be called past a registry that has switched them off."""
    if os.environ.get(SWITCH, "1").strip().lower() in _FALSE:
        return f"comfy-kitchen's kernels are switched off by {SWITCH}"
    override = _override()
    if override not in (None, "cuda"):
        return f"comfy-kitchen is set to its backend {override}"
    module = _cuda_module()
    if not getattr(module, "_EXT_AVAILABLE", False):
        return f"comfy-kitchen's extension does not load ({getattr(module, '_EXT_ERROR', None)})"
    missing = [name for name in ops if not hasattr(module, name)]
    if missing:
        return f"comfy-kitchen's cuda module has no {missing[0]}"
    driver = _driver_cuda()
    if driver is not None and driver < _CUDA:
        return (
            f"the NVIDIA driver knows CUDA {driver[0]}.{driver[1]}, and comfy-kitchen's kernels "
            "need CUDA 13 (driver 580 or newer)"
        )
    return None


def is_direct(device: torch.device) -> bool:
    """Whether the compiled functions are called past the registry on this device."""
    return unavailable() is None and functions(device) is not sys.modules["comfy_kitchen"]


def torch_build() -> str:
    """This torch in words: "torch 2.8.0 is built for CUDA 12.8"."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"torch {torch.__version__.partition('+')[0]} is built for {built}"


def _advice() -> str:
    return f"{torch_build()}; install a torch for CUDA 13 (cu130), or choose backend dequant"


def _cuda_module() -> ModuleType | None:
    try:
        from comfy_kitchen.backends import cuda
    except Exception:  # noqa: BLE001 - its layout takes any error for "not there", too
        return None
    return cuda


def _override() -> str | None:
    """The backend of `with comfy_kitchen.use_backend(...)`, if any."""
    import comfy_kitchen

    local = getattr(getattr(comfy_kitchen, "registry", None), "_thread_local", None)
    return getattr(local, "backend_override", None)


@functools.cache
def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver knows; None if it cannot be asked."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return divmod(version.value // 10, 100) if version.value else None
