"""Any attention call ComfyUI makes, as the views kernels take, and a kernel's output as it expects.

Shapes and conventions are those of `attention_pytorch` and `_reshape_qkv_to_heads` (ComfyUI 0.33,
comfy/ldm/modules/attention.py). Nothing is copied where a view can say the same.
"""

from functools import cache
from typing import NamedTuple

import torch

from .request import MASK_BIAS, MASK_BOOL, MASK_NONE, Request

_DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class Views(NamedTuple):
    """One call as kernels take it: q [B,H,Nq,D], k and v [B,Hkv,Nk,D], mask for [B,H,Nq,Nk]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None


def read_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *,
    mask: torch.Tensor | None = None,
    skip_reshape: bool = False,
    enable_gqa: bool = False,
    scale: float | None = None,
) -> Views:
    """The call's tensors as [B,H,N,D] views.

    q, k, v: [B,H,N,D] with skip_reshape, else [B,N,H*D]; k and v may also be [B,N,H,D] beside a
    3-D q (SD3). mask: bool (True = attend) or additive; 2-D is [Nq,Nk], 3-D is [B,Nq,Nk].
    """
    if not skip_reshape:
        batch, head_dim = q.shape[0], q.shape[-1] // heads
        kv_heads = k.shape[-1] // head_dim if enable_gqa else heads
        q = _split_heads(q, batch, heads, head_dim)
        k = _split_heads(k, batch, kv_heads, head_dim)
        v = _split_heads(v, batch, kv_heads, head_dim)
    elif k.shape[0] != q.shape[0]:  # torch's SDPA broadcasts a batch of one
        k = k.expand(q.shape[0], -1, -1, -1)
        v = v.expand(q.shape[0], -1, -1, -1)
    if mask is not None:
        if mask.ndim == 2:
            mask = mask.unsqueeze(0)
        if mask.ndim == 3:
            mask = mask.unsqueeze(1)
    return Views(q, k, v, mask, scale)


def _split_heads(x: torch.Tensor, batch: int, heads: int, head_dim: int) -> torch.Tensor:
    """[B,N,H*D] or [B,N,H,D] as [B,H,N,D]; one view op where two would take twice as long."""
    if x.ndim == 3 and x.shape[0] == batch and x.shape[2] == heads * head_dim:
        batch_stride, token_stride, stride = x.stride()
        strides = (batch_stride, head_dim * stride, token_stride, stride)
        return x.as_strided((batch, heads, x.shape[1], head_dim), strides)
    return x.reshape(batch, -1, heads, head_dim).transpose(1, 2)


def write_output(out: torch.Tensor, *, skip_output_reshape: bool) -> torch.Tensor:
    """out [B,H,Nq,D] as the caller wants it: as it is, or [B,Nq,H*D]."""
    if skip_output_reshape:
        return out
    return out.transpose(1, 2).flatten(2)


def request_of(
    views: Views, *, low_precision: bool = True, dense: bool = False, want_lse: bool = False
) -> Request:
    """What the eligibility rules need to know about a call."""
    q, k, mask, scale = views.q, views.k, views.mask, views.scale
    batch, heads, q_tokens, head_dim = q.shape
    on_cuda = q.device.type == "cuda"
    if mask is None:
        mask_kind = MASK_NONE
    else:
        mask_kind = MASK_BOOL if mask.dtype == torch.bool else MASK_BIAS
    return Request(
        device_type=q.device.type,
        dtype=_DTYPE_NAMES.get(q.dtype) or str(q.dtype).removeprefix("torch."),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        q_tokens=q_tokens,
        k_tokens=k.shape[2],
        head_dim=head_dim,
        value_dim=views.v.shape[3],
        capability=_capability(q.device.index) if on_cuda else None,
        device_name=_device_name(q.device.index) if on_cuda else "",
        is_hip=torch.version.hip is not None,
        mask=mask_kind,
        mask_dims=mask_dims(mask),
        has_scale=scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-6,
        low_precision=low_precision,
        want_lse=want_lse,
        dense=dense,
        capturing=on_cuda and torch.cuda.is_current_stream_capturing(),
    )


def mask_dims(mask: torch.Tensor | None) -> str:
    """The dims of a mask that have more than one entry: "bk" for [B,1,1,Nk], "" without a mask."""
    if mask is None:
        return ""
    names = "bhqk"[-mask.ndim :]
    return "".join(name for name, size in zip(names, mask.shape, strict=True) if size > 1)


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
