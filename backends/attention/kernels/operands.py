"""Operands as GPU kernels want them: aligned rows, padded heads, whole K and V, additive masks.

Everything returns its input where nothing has to change, and never writes to it.
Shapes: B batch, H q heads, Hkv k/v heads, N tokens, D head width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

ALIGNMENT_BYTES = 16  # vectorised loads of the CUDA kernels
INT32 = 2**31


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x [B,H,N,D] with unit stride in D, rows at multiples of 16 bytes and offsets in 32 bits."""
    size = x.element_size()
    last = 0
    fits = x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT_BYTES == 0
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        last += (length - 1) * stride
        fits = fits and (length == 1 or (stride > 0 and stride * size % ALIGNMENT_BYTES == 0))
    if fits and last < INT32:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def pad_head_dim(x: torch.Tensor, multiple: int = 8) -> torch.Tensor:
    """x [...,D] with zeros up to a multiple: no score changes if the scale is kept."""
    missing = -x.shape[-1] % multiple
    return functional.pad(x, (0, missing)) if missing else x


def trim(out: torch.Tensor, head_dim: int) -> torch.Tensor:
    """out [...,D'] without the padding, dense."""
    return out if out.shape[-1] == head_dim else out[..., :head_dim].contiguous()


def expand_kv(x: torch.Tensor, heads: int) -> torch.Tensor:
    """k or v [B,Hkv,N,D] with every head repeated for its group of q heads: [B,H,N,D]."""
    repeats = heads // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mask as a bias on the scores: 0 where bool attends, -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, float("-inf"))


def bias_rows(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """mask as a bias [B,H,Nq,Nk] (expanded, not copied) with rows at multiples of 8 elements."""
    bias = additive(mask, q.dtype)
    num_keys = k.shape[2]
    while bias.ndim < 4:
        bias = bias.unsqueeze(0)
    bias = bias.expand(-1, -1, -1, num_keys)
    if num_keys % 8 or bias.stride(-1) != 1:
        bias = functional.pad(bias, (0, -num_keys % 8))[..., :num_keys]
    bias = bias if _rows_aligned(bias) else bias.clone(memory_format=torch.contiguous_format)
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], num_keys)


def _rows_aligned(bias: torch.Tensor) -> bool:
    dims = zip(bias.shape[:-1], bias.stride()[:-1], strict=True)
    return (
        bias.stride(-1) == 1
        and bias.data_ptr() % ALIGNMENT_BYTES == 0
        and all(length == 1 or stride % 8 == 0 for length, stride in dims)
    )


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one: Triton launches there, and SageAttention sets it for good."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def flash(
    attention: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    want_lse: bool,
    options: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A flash_attn_func of any generation, whose layout is [B,N,H,D], on q, k, v [B,H,N,D].

    options: how it is asked for the log-sum-exp; one that returns it unasked is fine, too.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (aligned(pad_head_dim(x)).transpose(1, 2) for x in (q, k, v))
    with on_device_of(q):
        result = attention(q, k, v, softmax_scale=scale, **options)
    out = result[0] if isinstance(result, tuple) else result
    out = trim(out, head_dim).transpose(1, 2)
    return (out, result[1]) if want_lse else out
