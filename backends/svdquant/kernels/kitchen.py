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
from .kitchen_access import functions, switched_off, unavailable

_MAX_EXTRA_RANK = 256  # beyond it the LoRA is a matmul of its own
_ROW_STEP = 256  # the kernels pad rows to a multiple of it
_MAX_ELEMENTS = 2**31  # their index arithmetic is 32-bit
_DTYPES = ("bfloat16", "float16")


class Kitchen:
    id = "kitchen"

    def available(self) -> str | None:
        return unavailable()

    def ineligible(self, request: LayerRequest) -> str | None:
        if request.precision == "nvfp4":
            return _nvfp4_ineligible(request)
        if request.device_type != "cuda":
            return None
        if request.sm is not None and request.sm < 80:
            return f"SM{request.sm}: comfy-kitchen's int4 kernels need SM80 (RTX 30) or newer"
        if request.dtype not in _DTYPES:
            return f"{request.dtype}: comfy-kitchen's GPU kernels need bf16 or fp16"
        return switched_off("hip" if request.is_hip else "cuda", request.precision)

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
        most = max_rows(segment)
        if x.shape[0] <= most:
            return run(x, segment, bias, extra, share)
        return torch.cat([run(part, segment, bias, extra, None) for part in x.split(most)])


def max_rows(segment: Segment) -> int:
    """How many rows of x one call takes: beyond it, the kernels' 32-bit indices overflow."""
    widest = max(segment.facts.num_columns, segment.facts.num_rows)
    return (_MAX_ELEMENTS - 1) // widest // _ROW_STEP * _ROW_STEP


def release_workspaces() -> None:
    """Drop the GPU memory that comfy-kitchen keeps for each token count it has seen.

    84 MB for a 1024 x 1024 FLUX.1 image, in a dict that nothing else clears (0.2.31 to 0.2.40).
    """
    cuda = sys.modules.get("comfy_kitchen.backends.cuda")
    workspaces = getattr(cuda, "_SVDQUANT_WORKSPACE_CACHE", None)
    if isinstance(workspaces, dict):
        workspaces.clear()


def _nvfp4_ineligible(request: LayerRequest) -> str | None:
    if request.device_type != "cuda" or request.sm is None or request.sm < 100:
        here = request.device_type if request.sm is None else f"SM{request.sm}"
        return f"{here}: nvfp4 matmuls need SM100 (RTX 50, B200) or newer"
    if request.dtype not in _DTYPES:
        return f"{request.dtype}: nvfp4 matmuls need bf16 or fp16"
    return switched_off("cuda", "nvfp4")


def _int4(
    x: torch.Tensor,
    segment: Segment,
    bias: torch.Tensor | None,
    extra: LowRank | None,
    share: ShareKey | None,
) -> torch.Tensor:
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
    y = functions(x.device).scaled_mm_svdquant_w4a4(
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
    unsigned = segment.facts.unsigned
    return functions(x.device).quantize_svdquant_w4a4(
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
    gemv = functions(x.device).gemv_awq_w4a16
    y = gemv(x, segment.q, segment.scale, segment.zeros, bias=bias)
    return add_low_rank(y, x, segment, extra)
