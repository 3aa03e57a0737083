"""ComfyUI's own exact attention as a kernel: the last resort on a GPU.

attention_pytorch is torch's SDPA with every fused kernel behind it: it takes every mask, width
and length, and costs a fraction of plain attention.
"""

from typing import Any

import torch

from ... import host
from ..request import Request
from .base import EXACT
from .flash_sdpa import MOST_BATCH
from .math import Math


class ComfyUIPytorch:
    """comfy.ldm.modules.attention.attention_pytorch; plain attention without a ComfyUI."""

    id, category, lse, sparse, pip = "pytorch", EXACT, False, False, ""

    def available(self) -> str | None:
        return None

    def ineligible(self, request: Request) -> str | None:
        return None

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
        function = host.attention_function("attention_pytorch")
        if function is None or q.shape[0] > MOST_BATCH:  # it forgets skip_output_reshape there
            out = Math().run(q, k, v, mask=mask, scale=scale)
            assert isinstance(out, torch.Tensor)
            return out
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        out = function(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, **options
        )
        return out.contiguous()
