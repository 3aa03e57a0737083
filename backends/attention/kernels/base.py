"""The one signature every kernel has, and the words they share."""

from typing import Protocol

import torch

from ..request import Request

EXACT = "exact"  # same mathematics as torch's SDPA, other rounding
APPROXIMATE = "approximate"  # quantised or sparse


class Kernel(Protocol):
    """q and out [B,H,Nq,D], k and v [B,Hkv,Nk,D], lse fp32 [B,H,Nq], natural log.

    mask: None, or bool (True = attend) or additive, of any shape that broadcasts to [B,H,Nq,Nk].
    Padding, casts and GQA expansion stay inside the kernel's file. It never writes to its inputs,
    and its output aliases none of them.
    """

    id: str
    category: str  # EXACT or APPROXIMATE
    lse: bool  # can return the log-sum-exp
    sparse: bool  # skips keys: only policy "fastest" tries it
    pip: str  # how to install it, "" if it comes with torch or ComfyUI

    def available(self) -> str | None: ...

    def ineligible(self, request: Request) -> str | None: ...

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        want_lse: bool = False,
    ) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]": ...
