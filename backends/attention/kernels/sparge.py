"""SpargeAttn: each query block attends to the half of the key blocks that score highest, in INT8.

No calibration: the package's recommended top-k entry point with its own defaults. It wants at
least one block of queries (128). Source: spas_sage_attn/core.py, setup.py and README.md of
thu-ml/SpargeAttn: whatever is no SM8x with FP16 and no SM90 takes the route of SM89, Blackwell too.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import heads, operands, rules
from .base import APPROXIMATE
from .package import TRITON, PackageKernel, UnavailableError, require_c_compiler

BLOCK = 128
TOP_K = 0.5  # share of key blocks kept


class Sparge(PackageKernel):
    """spas_sage_attn.spas_sage2_attn_meansim_topk_cuda."""

    id, category, lse, sparse = "sparge", APPROXIMATE, False, True
    package, title = "spas_sage_attn", "SpargeAttn"
    pip = (
        "Windows: a prebuilt wheel from https://github.com/woct0rdho/SpargeAttn/releases; "
        "Linux: build https://github.com/thu-ml/SpargeAttn"
    )
    distributions = ("spas-sage-attn", *TRITON)
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        name = "spas_sage2_attn_meansim_topk_cuda"
        if not hasattr(package, name):
            raise UnavailableError(f"spas_sage_attn has no function {name}. {self.pip}")
        require_c_compiler(self.title)
        self._attention = getattr(package, name)

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, only=(80, 86, 87, 89, 90, 120, 121))
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, only=(64, 128))
            or rules.no_mask(name, request)
            or rules.gqa(name, request, allowed=False)
            or rules.precision(name, request)
            or _too_short(name, request)
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
            with operands.on_device_of(q):
                out: torch.Tensor = self._attention(
                    *map(operands.aligned, (q, k, v)), topk=TOP_K, is_causal=False, scale=scale
                )
            return out.contiguous()

        batch, num_heads, q_tokens, _ = q.shape
        block_scores = batch * num_heads * -(-q_tokens // BLOCK) * -(-k.shape[2] // 64)
        copies = q.numel() + k.numel() + 3 * v.numel() + 20 * block_scores  # sorted, with indices
        return heads.in_groups(attention, q, k, v, workspace_bytes=copies)


def _too_short(name: str, request: Request) -> str | None:
    tokens = min(request.q_tokens, request.k_tokens)
    return f"{tokens} tokens: {name} needs {BLOCK}" if tokens < BLOCK else None
