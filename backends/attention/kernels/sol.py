"""comfy-kitchen's Sol-Attn: blocks of 64 keys that matter exactly, one pooled term for each other.

Training-free and INT8; every query block finds its own key blocks (tau). q, k and v of one shape,
128 wide, layout [B,N,H,D]. Source: comfy_kitchen/__init__.py, constraints.py and
backends/cuda/__init__.py, 0.2.40, whose docstring says that it wins from about 12,000 tokens.
Its chunked form takes projections with norm and RoPE inside, which no attention hook sees.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import heads, kitchen, operands, rules
from .base import APPROXIMATE
from .package import PackageKernel

FEWEST_TOKENS = 8_192
WORKSPACE = 3.6  # bytes per element of q, by the package's own plan at 12,288 to 75,600 tokens


class SolAttn(PackageKernel):
    """comfy_kitchen.sol_attn with its own tau."""

    id, category, lse, sparse = "sol_attn", APPROXIMATE, False, True
    package, title, pip = kitchen.PACKAGE, kitchen.TITLE, kitchen.PIP
    distributions = kitchen.DISTRIBUTIONS
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        self._attention = kitchen.function(package, "sol_attn", "Sol-Attn (0.2.40 has)")
        kitchen.require_device(
            package.sol_attn_is_available,
            "Sol-Attn",
            "SM80 or newer and torch for CUDA 13, or RDNA3 or newer",
        )

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=80)
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, only=(128,))
            or rules.no_mask(name, request)
            or _lengths(name, request)
            or rules.gqa(name, request)
            or rules.precision(name, request)
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
        assert mask is None
        assert not want_lse

        def attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            k, v = operands.expand_kv(k, q.shape[1]), operands.expand_kv(v, q.shape[1])
            q, k, v = (operands.aligned(x).transpose(1, 2) for x in (q, k, v))
            with operands.on_device_of(q):
                out: torch.Tensor = self._attention(q, k, v, scale=scale)
            return out.transpose(1, 2)

        return heads.in_groups(attention, q, k, v, workspace_bytes=WORKSPACE * q.numel())


def _lengths(name: str, request: Request) -> str | None:
    """As many keys as queries, and enough of them that leaving some out pays."""
    if request.q_tokens != request.k_tokens:
        return f"{request.q_tokens} queries, {request.k_tokens} keys: {name} needs as many"
    if request.q_tokens < FEWEST_TOKENS:
        return f"{request.q_tokens} tokens: {name} is slower than others below {FEWEST_TOKENS}"
    return None
