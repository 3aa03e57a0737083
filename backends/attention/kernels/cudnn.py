"""cuDNN's fused attention through torch's aten op: exact, NVIDIA only.

Rules are those of torch's own check (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 2.11),
taken at their narrowest: head_dim over 128 depends on GPU and cuDNN, so it is left to others.
"""

import torch

from ..request import Request
from . import operands, rules
from .base import EXACT

SAFE_LENGTH = 128  # cuDNN before 9.15.1 misbehaves at other multiples (pytorch/pytorch#169849)
FIXED_IN = 91_501


class Cudnn:
    """aten::_scaled_dot_product_cudnn_attention."""

    id, category, lse, sparse, pip = "cudnn", EXACT, True, False, ""

    def available(self) -> str | None:
        if hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention"):
            return None
        return f"torch {torch.__version__} has no cuDNN attention. Update torch to 2.5 or newer"

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, low=80, high=121)
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, most=128)
            or rules.gqa(name, request)
            or rules.grid(name, request)
            or _lengths(request)
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
        bias = None if mask is None else operands.additive(mask, q.dtype)
        if bias is not None:
            bias_heads = bias.shape[-3] if bias.ndim > 2 else 1
            bias = bias.expand(q.shape[0], bias_heads, q.shape[2], k.shape[2])
        q, k, v = (operands.aligned(operands.pad_head_dim(x)) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, want_lse, 0.0, False, False, scale=scale
        )
        out = operands.trim(out, head_dim)
        if not want_lse:
            return out
        return out, lse.reshape(q.shape[0], q.shape[1], -1)[..., : q.shape[2]]


def _lengths(request: Request) -> str | None:
    if request.k_tokens == 1:
        return "1 key: cudnn needs two or more"
    if request.q_tokens % SAFE_LENGTH == 0 and request.k_tokens % SAFE_LENGTH == 0:
        return None
    version = torch.backends.cudnn.version() or 0
    if version >= FIXED_IN:
        return None
    return (
        f"{request.q_tokens} queries, {request.k_tokens} keys: cuDNN {version} is only safe at "
        f"multiples of {SAFE_LENGTH} (pytorch/pytorch#169849). Update torch"
    )
