"""xFormers' memory-efficient attention: exact, a bias through its CUTLASS kernel. [B,N,H,D].

CUTLASS ends at SM90 (ops/fmha/cutlass.py, 0.0.35); its flash op, without fp32 and bias, does not.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT
from .package import PackageKernel


class Xformers(PackageKernel):
    """xformers.ops.memory_efficient_attention. Only some of its kernels give the log-sum-exp."""

    id, category, lse, sparse = "xformers", EXACT, False, False
    package, title = "xformers.ops", "xformers"
    pip = "pip install xformers (the release for your torch)"
    distributions = ("xformers",)
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        self._attention = package.memory_efficient_attention

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=50)
            or rules.dtype(name, request, "float16", "bfloat16", "float32")
            or _beyond_cutlass(name, request)
            or rules.head_dim(name, request, most=256)
            or rules.gqa(name, request)
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
        head_dim = q.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        bias = None if mask is None else operands.bias_rows(mask, q, k)
        k, v = operands.expand_kv(k, q.shape[1]), operands.expand_kv(v, q.shape[1])
        q, k, v = (operands.aligned(operands.pad_head_dim(x)).transpose(1, 2) for x in (q, k, v))
        with operands.on_device_of(q):
            out = self._attention(q, k, v, attn_bias=bias, scale=scale)
        return operands.trim(out, head_dim).transpose(1, 2)


def _beyond_cutlass(name: str, request: Request) -> str | None:
    if request.sm is None or request.sm <= 90:
        return None
    if request.has_mask:
        return f"mask on SM{request.sm}: {name} takes one up to SM90"
    if request.dtype == "float32":
        return f"float32 on SM{request.sm}: {name} takes it up to SM90"
    return None
