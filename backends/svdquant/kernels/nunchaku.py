"""Nunchaku's own kernels, where its compiled package is installed. Unverified: needs such a GPU.

Weights are put back into the file's order per call. Unsigned layers are left to other kernels:
nunchaku quantises their input only inside its fused GELU kernel.
"""

import importlib.util
from pathlib import Path

import torch

from .. import layouts
from ..casts import narrowed
from ..weight import Segment
from .base import LayerRequest, LowRank, ShareKey, add_low_rank

_PAD = 256
_MAX_AWQ_ROWS = 8
_HOME = "https://nunchaku.tech/docs/nunchaku/installation/installation.html"


class Nunchaku:
    id = "nunchaku"

    def available(self) -> str | None:
        spec = importlib.util.find_spec("nunchaku")
        if spec is None:
            return f"nunchaku is not installed (wheels: {_HOME})"
        folders = spec.submodule_search_locations or []
        # PyPI's package of this name does statistics: it is recognised without importing it
        if not any(True for folder in folders for _ in Path(folder).glob("_C.*")):
            return (
                "The installed `nunchaku` is the unrelated PyPI package (no nunchaku._C.ops): "
                f"pip uninstall nunchaku, then a wheel from {_HOME}"
            )
        try:
            from nunchaku._C import ops
        except Exception as error:  # noqa: BLE001 - a wheel for another torch raises anything
            return f"nunchaku cannot be imported ({error}): wheels at {_HOME}"
        if not hasattr(ops, "gemm_w4a4"):
            return f"this nunchaku has no gemm_w4a4: wheels at {_HOME}"
        return None

    def ineligible(self, request: LayerRequest) -> str | None:
        if request.device_type != "cuda" or request.is_hip or request.sm is None:
            return f"{request.device_type}: nunchaku has kernels for NVIDIA GPUs only"
        if request.dtype not in ("bfloat16", "float16"):
            return f"{request.dtype}: nunchaku needs bf16 or fp16"
        if request.sm // 10 == 9:
            return "nunchaku has no SM90 kernels. Choose backend kitchen or dequant"
        if request.precision == "nvfp4":
            return None if request.sm >= 120 else f"SM{request.sm}: nunchaku's fp4 needs SM120"
        if request.sm not in (75, 80, 86, 89):
            return f"SM{request.sm}: nunchaku's int4 kernels are for SM75, SM80, SM86 and SM89"
        if request.sm == 75 and request.dtype != "float16":
            return "SM75: nunchaku needs fp16"
        if request.unsigned:
            return "nunchaku quantises unsigned inputs only inside its fused GELU kernel"
        return None

    def run(
        self,
        x: torch.Tensor,
        segment: Segment,
        *,
        bias: torch.Tensor | None = None,
        extra: LowRank | None = None,
        share: ShareKey | None = None,
    ) -> torch.Tensor:
        if segment.facts.precision == "awq":
            return _awq(x, segment, bias, extra)
        return _gemm(x, segment, bias, extra)


def _gemm(
    x: torch.Tensor, segment: Segment, bias: torch.Tensor | None, extra: LowRank | None
) -> torch.Tensor:
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    assert segment.smooth is not None
    assert segment.down is not None
    assert segment.up is not None
    is_fp4 = segment.facts.precision == "nvfp4"
    down, up = segment.down, segment.up
    if extra is not None:
        down, up = torch.cat([down, extra.down], 1), torch.cat([up, extra.up], 1)
    codes, scales, low = svdq_quantize_w4a4_act_fuse_lora_cuda(
        x,
        lora_down=layouts.down_to_file(down),
        smooth=layouts.vector_to_file(segment.smooth),
        fp4=is_fp4,
        pad_size=_PAD,
    )
    if is_fp4:
        assert segment.rows is not None
        weight = layouts.weight_to_file(layouts.swap_nibbles(segment.q).view(torch.int8))
        plain = layouts.plain_from_blocked(segment.scale).view(torch.uint8).t().contiguous()
        weight_scales = layouts.fp8_scales_to_file(plain)
        rows = layouts.vector_to_file(narrowed(segment.rows, x.dtype))
    else:
        weight, rows = layouts.weight_to_file(segment.q), None
        weight_scales = layouts.scales_to_file(segment.scale)
    out = torch.empty(codes.shape[0], segment.facts.num_rows, dtype=x.dtype, device=x.device)
    svdq_gemm_w4a4_cuda(
        act=codes,
        wgt=weight,
        out=out,
        ascales=scales,
        wscales=weight_scales,
        lora_act_in=low,
        lora_up=layouts.up_to_file(up),
        bias=None if bias is None else layouts.vector_to_file(bias),
        fp4=is_fp4,
        alpha=1.0,
        wcscales=rows,
    )
    return out[: x.shape[0]]


def _awq(
    x: torch.Tensor, segment: Segment, bias: torch.Tensor | None, extra: LowRank | None
) -> torch.Tensor:
    from nunchaku.ops.gemv import awq_gemv_w4a16_cuda

    assert segment.zeros is not None
    weight = layouts.awq_to_file(segment.q)
    zeros = segment.zeros - 8 * segment.scale
    y = torch.cat(
        [
            awq_gemv_w4a16_cuda(
                in_feats=part,
                kernel=weight,
                scaling_factors=segment.scale,
                zeros=zeros,
                m=part.shape[0],
                n=segment.facts.num_rows,
                k=segment.facts.num_columns,
                group_size=layouts.GROUP["awq"],
            )
            for part in x.split(_MAX_AWQ_ROWS)
        ]
    )
    y = add_low_rank(y, x, segment, extra)
    return y if bias is None else y.add_(bias)
