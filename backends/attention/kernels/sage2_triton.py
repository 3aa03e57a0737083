"""SageAttention 2.x in Triton: INT8 q and k, v in FP16, and the only one of its forms with a mask.

The package adds a mask to scores that are already in powers of two, and turns -inf into NaN where
a whole block is masked (both seen in Triton's interpreter: rel-L1 0.4 and NaN; 0.01 as given
here). So a bias is multiplied by log2(e) and bounded. A row that attends to nothing is not zero.
Source: sageattention/core.py and triton/attn_qk_int8_per_block.py, 2.2; its authors do not use it
on SM12x.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import rules
from .base import APPROXIMATE
from .package import UnavailableError, version_of
from .sage2 import Sage2, call_options, in_groups, with_lse

FUNCTION = "sageattn_qk_int8_pv_fp16_triton"
LOWEST = -3e4  # in fp16's range, and no weight beside any score


class Sage2Triton(Sage2):
    """sageattention.sageattn_qk_int8_pv_fp16_triton."""

    id, category, lse, sparse = "sage2_triton", APPROXIMATE, True, False
    _attention: Callable[..., Any]

    def load(self, package: Any) -> None:
        super().load(package)
        attention = getattr(package, FUNCTION, None)
        # Older ones swallow attn_mask in **kwargs.
        if attention is None or "attn_mask" not in inspect.signature(attention).parameters:
            found = version_of("sageattention")
            raise UnavailableError(
                f"sageattention {found} has no {FUNCTION} with attn_mask, 2.2 has. {self.pip}"
            )
        self._attention = attention

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, low=80, high=90)
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, most=128)
            or rules.gqa(name, request)
            or rules.precision(name, request)
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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        options = call_options(scale)
        if mask is not None:
            mask = in_powers_of_two(mask, q.dtype)
            mask = mask[(None,) * (4 - mask.ndim)]
        if want_lse:
            masks = {} if mask is None else {"attn_mask": mask}
            return with_lse(self._attention, q, k, v, {**masks, **options})
        return in_groups(self._attention, q, k, v, mask, options)


def in_powers_of_two(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as the package adds it: bool as it is, a bias times log2(e) without -inf."""
    if mask.dtype == torch.bool:
        return mask
    return (mask.float() * math.log2(math.e)).clamp_(LOWEST, -LOWEST).to(dtype)
