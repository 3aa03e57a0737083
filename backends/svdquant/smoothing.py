"""Which smoothing factors a layer gets: tried on recorded inputs, chosen by the output's error.

smooth = absmax_x^a / absmax_w^b per input channel, scaled to a geometric mean of 1. Trying all
pairs on whole layers would take hours, so each pair is tried on some of the layer's rows.
"""

import torch

from .layouts import UNSIGNED_SHIFT
from .quantize import output_error, quantise

NUM_ROWS = 384  # of the weight, for a trial
_COARSE = (0.3, 0.5, 0.7, 0.9)
_STEP = 0.1
_LIMIT = 100.0  # largest ratio of a factor to the mean


def choose_smooth(
    weight: torch.Tensor,
    absmax: torch.Tensor,
    inputs: torch.Tensor,
    *,
    rank: int,
    precision: str = "int4",
    unsigned: bool = False,
) -> torch.Tensor:
    """Factors [K] fp32 for a layer's weight [N, K].

    absmax: largest absolute input per channel [K]; inputs: some rows of inputs [M, K]; both as
    recorded, without the shift of an unsigned layer. No smoothing is one of the candidates.
    """
    stride = max(weight.shape[0] // NUM_ROWS, 1)
    some = weight[::stride][:NUM_ROWS].contiguous()
    largest_w = weight.abs().amax(0)
    largest_x = absmax + UNSIGNED_SHIFT if unsigned else absmax

    def error(exponents: tuple[float, float]) -> float:
        smooth = factors(largest_x, largest_w, *exponents)
        quantised = quantise(some, rank=rank, precision=precision, smooth=smooth)
        return output_error(some, quantised, inputs, precision=precision, unsigned=unsigned)

    tried = {pair: error(pair) for pair in [(0.0, 0.0), *((a, 0.0) for a in _COARSE)]}
    best = min(tried, key=lambda pair: tried[pair])
    if best[0]:
        around = [(best[0] - _STEP, 0.0), (best[0] + _STEP, 0.0)]
        tried |= {pair: error(pair) for pair in around if pair not in tried}
        best = min(tried, key=lambda pair: tried[pair])
        balanced = (best[0], 1.0 - best[0])
        tried[balanced] = error(balanced)
        best = min(tried, key=lambda pair: tried[pair])
    return factors(largest_x, largest_w, *best)


def factors(
    absmax_x: torch.Tensor, absmax_w: torch.Tensor, exponent_x: float, exponent_w: float
) -> torch.Tensor:
    """absmax_x^a / absmax_w^b with a geometric mean of 1, within 1/100 to 100."""
    smooth = absmax_x.clamp(min=1e-4) ** exponent_x / absmax_w.clamp(min=1e-6) ** exponent_w
    smooth = smooth / smooth.log().mean().exp()
    return smooth.clamp(1 / _LIMIT, _LIMIT)
