"""FlashAttention 2 from the flash-attn package: exact, no mask. Layout [B,N,H,D]."""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT
from .package import PackageKernel, UnavailableError


class Flash2(PackageKernel):
    """flash_attn.flash_attn_func."""

    id, category, lse, sparse = "flash2", EXACT, True, False
    package, title = "flash_attn", "flash-attn 2.x"
    pip = (
        "Take a prebuilt wheel for your Python, torch and CUDA: Linux from "
        "https://github.com/Dao-AILab/flash-attention/releases, Windows from "
        "https://github.com/kingbri1/flash-attention/releases (pip would compile for hours)"
    )
    distributions = ("flash-attn",)
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        # flash-attn-4 alone makes `flash_attn` a namespace package without this function.
        if not hasattr(package, "flash_attn_func"):
            raise UnavailableError(
                f"flash-attn 2.x is not installed (found only parts of flash_attn; with "
                f"flash-attn-4 choose 'flash4'). {self.pip}"
            )
        self._attention = package.flash_attn_func

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=80)
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
        options = {"return_attn_probs": want_lse}
        return operands.flash(
            self._attention, q, k, v, scale=scale, want_lse=want_lse, options=options
        )
