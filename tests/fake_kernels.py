"""Attention kernels for tests: they run anywhere, and can be told to be slow, wrong or broken."""

import torch
from slipstream.backends.attention.kernels.table import KERNELS
from torch.nn import functional


class FakeKernel:
    """SDPA under another id. error: added to the output; refuse: reason; raises: on run."""

    lse, sparse, pip = False, False, ""

    def __init__(self, id, category="approximate", *, error=0.0, refuse=None, raises=None, bad=()):
        self.id, self.category, self.error, self.refuse = id, category, error, refuse
        self.raises, self.bad = raises, bad  # bad: indices of calls that return NaN
        self.num_runs = 0

    def available(self):
        return None

    def ineligible(self, request):
        return self.refuse

    def run(self, q, k, v, *, mask=None, scale=None, want_lse=False):
        self.num_runs += 1
        if self.raises is not None:
            raise self.raises
        gqa = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa
        )
        if self.num_runs - 1 in self.bad:
            return torch.full_like(out, float("nan"))
        return out * (1 + self.error)


def table(*kernels):
    """(kernels, policies) for apply_attention: the given ones, approximate before exact."""
    by_id = {kernel.id: kernel for kernel in kernels}
    exact = tuple(k.id for k in kernels if k.category == "exact")
    approximate = tuple(k.id for k in kernels if k.category == "approximate")
    policies = {"exact": exact, "balanced": approximate, "fastest": approximate}
    return {**by_id, "math": KERNELS["math"]}, policies
