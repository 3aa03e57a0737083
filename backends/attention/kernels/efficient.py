"""torch's memory-efficient kernel (CUTLASS), through its aten op: exact, any mask, any width."""

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT
from .flash_sdpa import MOST_BATCH


class Efficient:
    """aten::_scaled_dot_product_efficient_attention."""

    id, category, lse, sparse, pip = "efficient", EXACT, True, False, ""

    def available(self) -> str | None:
        return None

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=50, high=121)
            or rules.dtype(name, request, "float16", "bfloat16", "float32")
            or rules.head_dim(name, request, most=256 if request.is_hip else None)
            or rules.gqa(name, request)
            or rules.grid(name, request, most_batch=MOST_BATCH)
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
        head_dim = q.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        bias = None if mask is None else operands.bias_rows(mask, q, k)
        k, v = operands.expand_kv(k, q.shape[1]), operands.expand_kv(v, q.shape[1])
        q, k, v = (operands.aligned(operands.pad_head_dim(x)) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, want_lse, 0.0, False, scale=scale
        )
        out = operands.trim(out, head_dim)
        # With compute_log_sumexp the op pads the rows to a multiple of 32.
        return (out, lse[..., : q.shape[2]]) if want_lse else out
