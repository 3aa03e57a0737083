"""16-bit matmuls with weights that are unpacked per call: for hardware without 4-bit units.

Inputs are not quantised, so the result is nearer to the 16-bit model than any 4-bit kernel's.
Takes one segment's weight in 16 bits while a layer runs.
"""

import torch

from ..weight import Segment, fp4_units, residual
from .base import LayerRequest, LowRank, ShareKey, add_low_rank, smoothed


class Dequant:
    id = "dequant"

    def available(self) -> str | None:
        return None

    def ineligible(self, request: LayerRequest) -> str | None:
        return None

    def run(
        self,
        x: torch.Tensor,
        segment: Segment,
        *,
        bias: torch.Tensor | None = None,
        extra: LowRank | None = None,
        share: ShareKey | None = None,
    ) -> torch.Tensor:
        inputs = smoothed(x, segment)
        if segment.rows is None:
            y = torch.nn.functional.linear(inputs, residual(segment, x.dtype), bias)
        else:
            # the unpacked fp4 weight is exact in 16 bits; its row factors are not, and come after
            y = torch.nn.functional.linear(inputs, fp4_units(segment, x.dtype))
            y = (y * segment.rows).to(x.dtype)
            y = y if bias is None else y.add_(bias)
        return add_low_rank(y, x, segment, extra)
