"""The accuracy check of one kernel on one call: fp32 on evenly spaced query rows, all keys.

It catches broken kernels and layers whose numbers a quantised kernel cannot hold; it says
nothing about picture quality. Costs about 256 / Nq of one attention and a bounded slice of memory.
"""

import math
from dataclasses import dataclass

import torch

from .reference import compare, evenly_spaced_rows, reference_rows

NUM_ROWS = 256


@dataclass(frozen=True)
class Verdict:
    """Error of a kernel's output against fp32: mean absolute, relative; cosine; all finite."""

    rel_l1: float
    cosine: float
    finite: bool

    def against(self, max_rel_l1: float, min_cos: float) -> str | None:
        """Which limit it breaks, in words, or None."""
        if not self.finite:
            return "NaN or infinite values"
        if self.rel_l1 > max_rel_l1:
            return f"rel-L1 above {max_rel_l1:g}"
        if self.cosine < min_cos:
            return f"cosine below {min_cos:g}"
        return None


def probe(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
) -> Verdict:
    """How far `out` [B,H,Nq,D] is from attention of q, k, v in fp32."""
    rows = evenly_spaced_rows(q.shape[2], NUM_ROWS, q.device)
    reference = reference_rows(q, k, v, mask=mask, scale=scale, rows=rows)
    rel_l1, cosine, _ = compare(out[:, :, rows], reference)
    return Verdict(rel_l1, cosine, is_finite(out))


def is_finite(out: torch.Tensor) -> bool:
    """Whether all values are finite; aminmax makes no temporaries of the size of `out`. One sync.

    torch.isfinite would make several: 1.5 GB and more for a long video's attention.
    """
    low, high = out.aminmax()  # NaN goes through
    return math.isfinite(float(high.float() - low.float())) if out.numel() else True
