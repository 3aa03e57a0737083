"""comfy-kitchen's INT8 attention: a requirement of ComfyUI, so installed everywhere it runs.

INT8 q, k and v after a Hadamard rotation, unsigned INT8 weights, its own shift of K; masks, GQA
and any width up to 256 (it pads by itself). It has CUDA and HIP kernels and no CPU fallback.
Source: comfy_kitchen/sage_attention.py, 0.2.31 to 0.2.40.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import heads, kitchen, operands, rules
from .base import APPROXIMATE
from .package import PackageKernel


class CkInt8(PackageKernel):
    """comfy_kitchen.int8_attention."""

    id, category, lse, sparse = "ck_int8", APPROXIMATE, False, False
    package, title, pip = kitchen.PACKAGE, kitchen.TITLE, kitchen.PIP
    distributions = kitchen.DISTRIBUTIONS
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        self._attention = kitchen.function(package, "int8_attention", "INT8 attention")
        kitchen.require_device(
            package.int8_attention_is_available,
            "INT8 attention",
            "SM75 or newer, or RDNA3 or newer",
        )

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=75)
            or rules.dtype(name, request, "float32", "float16", "bfloat16")
            or rules.head_dim(name, request, most=256)
            or rules.gqa(name, request)
            or rules.precision(name, request)
            or rules.no_lse(name, request)
            or rules.grid(name, request)
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        want_lse: bool = False,
    ) -> torch.Tensor:
        assert not want_lse
        scale = q.shape[-1] ** -0.5 if scale is None else scale

        def attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            q, k, v = map(operands.aligned, (q, k, v))
            with operands.on_device_of(q):
                out: torch.Tensor = self._attention(q, k, v, scale=scale, attn_mask=mask)
            return out.contiguous()

        int8 = q.numel() + k.numel() + v.numel()
        return heads.in_groups(attention, q, k, v, mask, workspace_bytes=int8)
