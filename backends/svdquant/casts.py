"""Casts between floating-point types that keep what is finite and what is not zero."""

from dataclasses import replace
from typing import Any

import torch

from .weight import Segment

_FP16_SMALLEST = 2.0**-24
_CAST = ("smooth", "down", "up", "zeros")  # and int4's and awq's scale; nvfp4's is fp8


def narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`; what is finite stays finite, and what is not zero does not become it.

    bf16 reaches further than fp16 on both sides: real files have biases beyond 65,504, which
    Nunchaku clamps too, and scales below fp16's smallest number, which would erase their group.
    """
    if tensor.dtype == dtype or dtype != torch.float16:
        return tensor.to(dtype)
    limits = torch.finfo(dtype)
    narrow = tensor.float().clamp(limits.min, limits.max).to(dtype)  # bf16 rounds the limit up
    lost = (narrow == 0) & (tensor != 0)
    return torch.where(lost, tensor.sign().to(dtype) * _FP16_SMALLEST, narrow)


def segment_in(segment: Segment, dtype: torch.dtype) -> Segment:
    """The segment with its 16-bit parts in `dtype`, to compute in; its codes stay 4-bit."""
    if segment.dtype == dtype:
        return segment
    names = _CAST if segment.facts.precision == "nvfp4" else (*_CAST, "scale")
    parts = {name: getattr(segment, name) for name in names}
    cast: dict[str, Any] = {n: narrowed(t, dtype) for n, t in parts.items() if t is not None}
    return replace(segment, **cast)
