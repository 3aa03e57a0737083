"""What the 4-bit kernels compute, in plain torch and fp32: to compare with, on any device.

int4 inputs are rounded as comfy-kitchen rounds them (division, scales and codes in the 16-bit
dtype), nvfp4 inputs as Nunchaku does (fp8 group scales, no factor per tensor).
"""

import torch

from ..layouts import GROUP
from ..quantize import quantise_inputs
from ..weight import Segment, residual
from .base import LayerRequest, LowRank, ShareKey, smoothed


class Reference:
    id = "reference"

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
        wide = x.float()
        y = rounded_inputs(x, segment) @ residual(segment).t()
        if segment.down is not None and segment.up is not None:
            y += (wide @ segment.down.float()) @ segment.up.float().t()
        if extra is not None:
            y += (wide @ extra.down.float()) @ extra.up.float().t()
        if bias is not None:
            y += bias.float()
        return y.to(x.dtype)


def rounded_inputs(x: torch.Tensor, segment: Segment) -> torch.Tensor:
    """fp32 [M, K]: the smoothed inputs as far as the segment's precision keeps them."""
    facts = segment.facts
    if segment.smooth is None:
        return x.float()
    inputs = smoothed(x, segment)
    if facts.precision == "nvfp4":
        return quantise_inputs(inputs, "nvfp4")
    groups = inputs.view(x.shape[0], -1, GROUP["int4"])
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    low, high = (0, 15) if facts.unsigned else (-7, 7)
    scale = largest / high
    codes = (groups / scale).round().clamp(low, high)
    return (codes.float() * scale.float()).view_as(inputs)
