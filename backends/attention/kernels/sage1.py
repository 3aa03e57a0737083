"""SageAttention 1.0.6 (Triton): INT8 q and k, v in fp16 (its own cast), no mask.

The package smooths K in place, so it gets a clone; smoothing matters (INT8 emulation with a
20-sigma bias on some K channels: rel-L1 0.053 without, 0.013 with). Source: sageattention/core.py.

It does not mask the end of its last block of 64 keys, where keys of zero take weight (rel-L1 0.28
at 77 keys, 0.035 at 1,030). So K and V are filled up with their means: smoothing makes such keys
zero again, a zero key weighs at most 1 / Nk of the row (Jensen's inequality, as scores of smoothed
keys have mean 0), and pulls it towards the mean of V instead of towards zero. Lengths at which
that could be more than 1 % are refused.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import heads, operands, rules
from .base import APPROXIMATE
from .package import TRITON, PackageKernel, UnavailableError, require_c_compiler, version_of

BLOCK = 64  # keys
MOST_FILLING = 0.01  # share of a row's weight that keys of our own may take
V2_FUNCTION = "sageattn_qk_int8_pv_fp16_cuda"  # 2.x has it, 1.x does not


class Sage1(PackageKernel):
    """sageattention 1.x: sageattn."""

    id, category, lse, sparse = "sage1", APPROXIMATE, False, False
    package, title = "sageattention", "sageattention 1.x"
    pip = "pip install sageattention==1.0.6 (Windows: triton-windows too)"
    distributions = ("sageattention", *TRITON)
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        if hasattr(package, V2_FUNCTION):
            raise UnavailableError(
                f"sageattention 1.x is not installed (found {version_of('sageattention')}, which "
                f"is 'sage2'). {self.pip}, or choose 'sage2'"
            )
        if not hasattr(package, "sageattn"):
            raise UnavailableError(f"sageattention has no function sageattn. {self.pip}")
        require_c_compiler(self.title)
        self._attention = package.sageattn

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request)
            or rules.arch(name, request, low=80)
            or rules.dtype(name, request, "float16", "bfloat16", "float32")
            or rules.head_dim(name, request, only=(64, 96, 128))
            or rules.no_mask(name, request)
            or rules.gqa(name, request)
            or rules.precision(name, request)
            or rules.no_lse(name, request)
            or rules.no_capture(name, request)
            or rules.grid(name, request)
            or rules.int32_offsets(name, request)
            or _last_block(name, request)
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
            keys = whole_blocks(k)
            if keys is k:
                keys = k.clone(memory_format=torch.contiguous_format)
            with operands.on_device_of(q):
                out: torch.Tensor = self._attention(
                    operands.aligned(q),
                    keys,
                    operands.aligned(whole_blocks(v)),
                    tensor_layout="HND",
                    is_causal=False,
                    sm_scale=scale,
                    smooth_k=True,
                )
            return out

        copies = q.numel() + k.nbytes + k.numel() + v.nbytes + 2 * v.numel()
        return heads.in_groups(attention, q, k, v, workspace_bytes=copies)


def whole_blocks(x: torch.Tensor) -> torch.Tensor:
    """k or v [B,H,N,D], filled with its mean over the tokens up to a multiple of BLOCK."""
    missing = -x.shape[2] % BLOCK
    if not missing:
        return x
    mean = x.mean(dim=2, keepdim=True)
    return torch.cat((x, mean.expand(-1, -1, missing, -1)), dim=2)


def _last_block(name: str, request: Request) -> str | None:
    missing = -request.k_tokens % BLOCK
    share = missing / (request.k_tokens + missing)
    if share <= MOST_FILLING:
        return None
    return (
        f"{request.k_tokens} keys: {name} cannot end in a part of a block of {BLOCK} keys here, "
        f"the rest of it would weigh up to {share:.1%}"
    )
