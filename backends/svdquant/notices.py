"""What a person should know before the first picture: why layers do not run in 4 bits here.

Shown on the loader's node, in Inspect's first lines and in the report.
"""

import torch

from ..registry import reason_against
from .engine import Engine, request_of
from .kernels import Kernel, LayerRequest
from .weight import QuantWeight


def notices(
    engine: Engine, samples: dict[str, QuantWeight], device: torch.device, title: str
) -> list[str]:
    """Of a loaded model on a GPU, if `auto` ends at unpacked layers; empty if it does not."""
    found = []
    for precision, weight in samples.items():
        if precision == "awq":
            continue
        request = request_of(weight.segments[0], device, engine.compute)
        kitchen = next(k for k in engine.kernels if k.id == "kitchen")
        reason = engine.failed.get(("kitchen", precision)) or reason_against(kitchen, request)
        if reason is not None and engine.choose(request).id == "dequant":
            found.append(notice(request, reason, title))
    return list(dict.fromkeys(found))


def expected(kernel: Kernel, requests: list[LayerRequest], title: str) -> list[str]:
    """The same before the model is loaded. kernel: comfy-kitchen's; requests: its layers."""
    found: dict[str, None] = {}
    for request in requests:
        reason = reason_against(kernel, request)  # type: ignore[arg-type]
        if reason is not None and request.device_type == "cuda" and request.precision != "awq":
            found[notice(request, reason, title)] = None
    return list(found)


def notice(request: LayerRequest, reason: str, title: str) -> str:
    """One paragraph: what is off, why, and what to do."""
    if request.dtype == "float32":
        return (
            f"{title} is computed in fp32 here, as ComfyUI computes its 16-bit model on this "
            "device: several times slower than 16 bits, and without the 4-bit kernels, which need "
            "bf16 or fp16. Instead: FLUX.1 or SDXL, which ComfyUI computes in fp16 on RTX 20 and "
            "RX 6000. dtype fp16 is faster, and black pictures are to be expected."
        )
    text = f"4-bit kernels are off: {reason}."
    if request.precision == "nvfp4" and request.sm is not None and 80 <= request.sm < 100:
        text += " An int4 file of the same model runs in 4 bits on this card."
    return f"{text} Until then layers are unpacked as they run, slower than the 16-bit model."
