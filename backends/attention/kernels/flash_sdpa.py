"""FlashAttention-2 as torch ships it, through its aten op: exact, no mask."""

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT

MOST_BATCH = 2**15  # ComfyUI 0.33's SDP_BATCH_LIMIT


class FlashSdpa:
    """aten::_scaled_dot_product_flash_attention."""

    id, category, lse, sparse, pip = "flash_sdpa", EXACT, True, False, ""

    def available(self) -> str | None:
        on_gpu = torch.version.cuda is not None or torch.version.hip is not None
        if on_gpu and not torch.backends.cuda.is_flash_attention_available():
            return (
                f"torch {torch.__version__} was built without FlashAttention. "
                "Choose 'cudnn' or 'efficient', or another build of torch"
            )
        return None

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=80, high=121)
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, most=256)
            or rules.no_mask(name, request)
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
        assert mask is None
        head_dim = q.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        q, k, v = (operands.aligned(operands.pad_head_dim(x)) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, False, False, scale=scale
        )
        out = operands.trim(out, head_dim)
        return (out, lse[..., : q.shape[2]]) if want_lse else out
