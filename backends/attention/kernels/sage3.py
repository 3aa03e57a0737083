"""SageAttention 3: FP4 on Blackwell. Its authors advise sage2 on the first and last steps.

It smooths K in place (so it gets a clone), knows one scale, and wants as many k/v heads as q heads.
It multiplies the mean of every 128 queries by all keys, in 16 and then 32 bits: 10 GB for all heads
of Wan at 720p, which is why they go in groups.
Source: sageattention3_blackwell/sageattn3/api.py and blackwell/api.cu of thu-ml/SageAttention.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import heads, operands, rules
from .base import APPROXIMATE
from .package import TRITON, PackageKernel, UnavailableError, require_c_compiler

BLOCK = 128  # queries


class Sage3(PackageKernel):
    """sageattn3.sageattn3_blackwell."""

    id, category, lse, sparse = "sage3", APPROXIMATE, False, False
    package, title = "sageattn3", "sageattn3"
    pip = (
        "Take a prebuilt wheel of sageattn3 for your Python and torch, or build "
        "https://github.com/thu-ml/SageAttention, folder sageattention3_blackwell"
    )
    distributions = ("sageattn3", *TRITON)
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        if not hasattr(package, "sageattn3_blackwell"):
            raise UnavailableError(f"sageattn3 has no function sageattn3_blackwell. {self.pip}")
        require_c_compiler(self.title)
        self._attention = package.sageattn3_blackwell

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, only=(100, 120, 121))
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, only=(64, 128))
            or rules.no_mask(name, request)
            or rules.gqa(name, request)
            or rules.default_scale(name, request)
            or rules.precision(name, request)
            or rules.no_lse(name, request)
            or rules.no_capture(name, request)
            or rules.grid(name, request)
            or rules.int32_offsets(name, request)
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
        assert mask is None
        assert not want_lse

        def attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            keys = operands.expand_kv(k, q.shape[1])
            if keys is k:
                keys = k.clone(memory_format=torch.contiguous_format)
            values = operands.aligned(operands.expand_kv(v, q.shape[1]))
            with operands.on_device_of(q):
                out: torch.Tensor = self._attention(
                    operands.aligned(q), keys, values, is_causal=False
                )
            return out.contiguous()

        means = 6 * q.shape[0] * q.shape[1] * -(-q.shape[2] // BLOCK) * k.shape[2]
        copies = q.nbytes + 2 * k.nbytes + v.nbytes
        return heads.in_groups(attention, q, k, v, workspace_bytes=copies + means)
