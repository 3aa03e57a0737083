"""comfy-kitchen's SVDQuant kernels (a requirement of ComfyUI): CUDA, HIP and plain torch.

Storage is natural row-major, as the kernels take it. Rows of x are padded to 256 by the kernels,
so outputs are cut. A LoRA joins the low-rank branch by rank, so the base result is untouched.
The kernels reuse one workspace per shape: what `quantize` returned is used before the next call.
"""

import sys
from typing import Any

import torch

from ..layouts import UNSIGNED_SHIFT
from ..quantize import FP4_MAX, FP8_MAX
from ..weight import Segment
from .base import LayerRequest, LowRank, ShareKey, add_low_rank, smoothed

_MAX_EXTRA_RANK = 256  # beyond it the LoRA is a matmul of its own
_NEEDED = {
    "int4": ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"),
    "awq": ("gemv_awq_w4a16",),
    "nvfp4": ("quantize_nvfp4", "scaled_mm_nvfp4"),
}
_OPS = (*_NEEDED["int4"], *_NEEDED["awq"])
_PIP = "pip install --upgrade comfy-kitchen"
_DTYPES = ("bfloat16", "float16")


class Kitchen:
    id = "kitchen"

    def available(self) -> str | None:
        try:
            import comfy_kitchen
        except Exception as error:  # noqa: BLE001 - a wheel for another torch raises anything
            return f"comfy-kitchen cannot be imported ({error}): {_PIP}"
        missing = [name for name in _OPS if not hasattr(comfy_kitchen, name)]
        if missing:
            version = getattr(comfy_kitchen, "__version__", "this version")
            return f"comfy-kitchen {version} lacks {missing[0]}; 0.2.31 or newer has it: {_PIP}"
        return None

    def ineligible(self, request: LayerRequest) -> str | None:
        if request.precision == "nvfp4":
            return _nvfp4_ineligible(request)
        if request.device_type != "cuda":
            return None
        if request.dtype not in _DTYPES:
            return f"{request.dtype}: comfy-kitchen's GPU kernels need bf16 or fp16"
        if request.sm is not None and request.sm < 80:
            return f"SM{request.sm}: comfy-kitchen's int4 kernels need SM80 (RTX 30) or newer"
        backend = "hip" if request.is_hip else "cuda"
        return _switched_off(backend, _NEEDED[request.precision])

    def run(
        self,
        x: torch.Tensor,
        segment: Segment,
        *,
        bias: torch.Tensor | None = None,
        extra: LowRank | None = None,
        share: ShareKey | None = None,
    ) -> torch.Tensor:
        run = {"int4": _int4, "nvfp4": _nvfp4, "awq": _awq}[segment.facts.precision]
        return run(x, segment, bias, extra, share)


def release_workspaces() -> None:
    """Drop the GPU memory that comfy-kitchen keeps for each token count it has seen.

    84 MB for a 1024 x 1024 FLUX.1 image, in a dict that nothing else clears (0.2.31 to 0.2.40).
    """
    cuda = sys.modules.get("comfy_kitchen.backends.cuda")
    workspaces = getattr(cuda, "_SVDQUANT_WORKSPACE_CACHE", None)
    if isinstance(workspaces, dict):
        workspaces.clear()


def _switched_off(backend: str, ops: tuple[str, ...]) -> str | None:
    """Why comfy-kitchen would fall back to plain torch on a GPU, which is slow; None if not."""
    if Kitchen().available() is not None:
        return None  # it says so itself
    import comfy_kitchen

    status = comfy_kitchen.list_backends().get(backend, {})
    if not status.get("available"):
        return f"comfy-kitchen has no {backend} kernels here ({status.get('unavailable_reason')})"
    if status.get("disabled"):
        return (
            f"comfy-kitchen's {backend} kernels are switched off by ComfyUI (torch "
            f"{torch.__version__}; CUDA kernels need a torch built for CUDA 13): install one, or "
            "choose backend dequant"
        )
    # RDNA 2 has the hip backend without its matrix kernels; nvfp4 needs cuBLASLt.
    capabilities = status.get("capabilities")
    missing = [op for op in ops if capabilities is not None and op not in capabilities]
    if missing:
        return f"comfy-kitchen's {backend} kernels on this GPU have no {missing[0]}"
    return None


def _nvfp4_ineligible(request: LayerRequest) -> str | None:
    if request.device_type != "cuda" or request.sm is None or request.sm < 100:
        here = request.device_type if request.sm is None else f"SM{request.sm}"
        return f"{here}: nvfp4 matmuls need SM100 (RTX 50, B200) or newer"
    if request.dtype not in _DTYPES:
        return f"{request.dtype}: nvfp4 matmuls need bf16 or fp16"
    return _switched_off("cuda", _NEEDED["nvfp4"])


def _int4(
    x: torch.Tensor,
    segment: Segment,
    bias: torch.Tensor | None,
    extra: LowRank | None,
    share: ShareKey | None,
) -> torch.Tensor:
    import comfy_kitchen

    assert segment.up is not None
    quantised = share.get() if share is not None else None
    if quantised is None:
        quantised = _quantise(x, segment)
        if share is not None:
            share.put(quantised)
    codes, scales, low = quantised
    up, side = segment.up, None
    if extra is not None and extra.up.shape[1] <= _MAX_EXTRA_RANK:
        joined = torch.zeros(low.shape[0], extra.down.shape[1], dtype=low.dtype, device=x.device)
        joined[: x.shape[0]] = x @ extra.down
        low, up = torch.cat([low, joined], 1), torch.cat([up, extra.up], 1)
    elif extra is not None:
        side = (x @ extra.down) @ extra.up.t()
    y = comfy_kitchen.scaled_mm_svdquant_w4a4(
        act=codes,
        wgt=segment.q,
        ascales=scales,
        wscales=segment.scale,
        lora_act_in=low,
        lora_up=up,
        bias=bias,
        act_unsigned=segment.facts.unsigned,
    )[: x.shape[0]]
    return y if side is None else y.add_(side)


def _quantise(x: torch.Tensor, segment: Segment) -> tuple[Any, Any, Any]:
    """Codes, scales and the low-rank branch's first product, which reads x unshifted."""
    import comfy_kitchen

    unsigned = segment.facts.unsigned
    return comfy_kitchen.quantize_svdquant_w4a4(
        x + UNSIGNED_SHIFT if unsigned else x,
        smooth=segment.smooth,
        lora_down=segment.down,
        act_unsigned=unsigned,
        lora_x=x if unsigned else None,
    )


def _nvfp4(
    x: torch.Tensor,
    segment: Segment,
    bias: torch.Tensor | None,
    extra: LowRank | None,
    share: ShareKey | None,
) -> torch.Tensor:
    import comfy_kitchen

    assert segment.rows is not None
    inputs = smoothed(x, segment)
    factor = (inputs.abs().amax().float() / (FP8_MAX * FP4_MAX)).clamp(min=1e-12)
    codes, scales = comfy_kitchen.quantize_nvfp4(inputs, factor, pad_16x=x.shape[0] % 16 != 0)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    y = comfy_kitchen.scaled_mm_nvfp4(
        codes, segment.q, factor, one, scales, segment.scale, out_dtype=x.dtype
    )[: x.shape[0]]
    y = add_low_rank((y * segment.rows).to(x.dtype), x, segment, extra)
    return y if bias is None else y.add_(bias)


def _awq(
    x: torch.Tensor,
    segment: Segment,
    bias: torch.Tensor | None,
    extra: LowRank | None,
    share: ShareKey | None,
) -> torch.Tensor:
    import comfy_kitchen

    y = comfy_kitchen.gemv_awq_w4a16(x, segment.q, segment.scale, segment.zeros, bias=bias)
    return add_low_rank(y, x, segment, extra)
