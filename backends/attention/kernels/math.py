"""torch's SDPA wherever it runs: the exact kernel that takes every call."""

import torch
from torch.nn import functional

from ..request import Request
from .base import EXACT


class Math:
    id, category, lse, sparse, pip = "math", EXACT, False, False, ""

    def available(self) -> str | None:
        return None

    def ineligible(self, request: Request) -> str | None:
        return None

    def run(self, q, k, v, *, mask=None, scale=None, want_lse=False):
        gqa = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa
        )
