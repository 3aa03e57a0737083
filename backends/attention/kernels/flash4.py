"""FlashAttention 4 (CuTe DSL): exact, no mask, compiled at the first call of a shape. [B,N,H,D].

Head widths by GPU are those of `_validate_head_dims` in flash_attn/cute/interface.py; which SMs
below 90 a pre-release takes varies, and a refusal at the call is a fallback.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT
from .package import PackageKernel, UnavailableError


class Flash4(PackageKernel):
    """flash_attn.cute.flash_attn_func."""

    id, category, lse, sparse = "flash4", EXACT, True, False
    package, title = "flash_attn.cute", "flash-attn-4"
    pip = "pip install --pre flash-attn-4"
    distributions = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
    _attention: Callable[..., Any]
    _asks_for_lse: bool

    def load(self, package: Any) -> None:
        if not hasattr(package, "flash_attn_func"):
            raise UnavailableError(f"flash_attn.cute has no flash_attn_func. {self.pip}")
        self._attention = package.flash_attn_func
        self._asks_for_lse = "return_lse" in inspect.signature(self._attention).parameters

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, low=80, high=129)
            or rules.dtype(name, request, "float16", "bfloat16")
            or _head_dim(name, request)
            or rules.no_mask(name, request)
            or rules.gqa(name, request)
            or rules.no_capture(name, request)
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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert mask is None
        options = {"return_lse": want_lse} if self._asks_for_lse else {}
        return operands.flash(
            self._attention, q, k, v, scale=scale, want_lse=want_lse, options=options
        )


def _head_dim(name: str, request: Request) -> str | None:
    """Up to 256 on SM90; on others up to 128, and 256 itself on SM10x and SM11x."""
    sm = request.sm or 0
    if sm // 10 == 9:
        return rules.head_dim(name, request, most=256)
    if sm // 10 in (10, 11) and request.head_dim == 256:
        return rules.head_dim(name, request, only=(256,))
    return rules.head_dim(name, request, most=128)
