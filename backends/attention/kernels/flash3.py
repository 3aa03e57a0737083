"""FlashAttention 3, for Hopper, Ampere and Ada: exact, no mask. Layout [B,N,H,D].

Early versions always return (out, lse); later ones return lse only if asked for.
Source: hopper/flash_attn_interface.py, flash_api.cpp and setup.py of Dao-AILab/flash-attention; a
build may leave SM8x out (FLASH_ATTENTION_DISABLE_SM80), which shows at the call.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT
from .package import PackageKernel, UnavailableError


class Flash3(PackageKernel):
    """flash_attn_interface.flash_attn_func."""

    id, category, lse, sparse = "flash3", EXACT, True, False
    package, title = "flash_attn_interface", "FlashAttention 3"
    pip = (
        "Linux: PyTorch's own wheel index has flash-attn-3 for CUDA 12.8 and newer; else build "
        "https://github.com/Dao-AILab/flash-attention, folder hopper"
    )
    distributions = ("flash-attn-3",)
    _attention: Callable[..., Any]
    _asks_for_lse: bool

    def load(self, package: Any) -> None:
        if not hasattr(package, "flash_attn_func"):
            raise UnavailableError(f"flash_attn_interface has no flash_attn_func. {self.pip}")
        self._attention = package.flash_attn_func
        self._asks_for_lse = "return_attn_probs" in inspect.signature(self._attention).parameters

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, low=80, high=90)
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, most=256)
            or rules.no_mask(name, request)
            or rules.gqa(name, request)
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
        options = {"return_attn_probs": want_lse} if self._asks_for_lse else {}
        return operands.flash(
            self._attention, q, k, v, scale=scale, want_lse=want_lse, options=options
        )
