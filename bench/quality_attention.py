"""How much error of attention a picture bears: what the limits of the attention probe are held to.

Inputs of every attention call are rounded to fewer and fewer bits, one scale per token and head,
and the error of each call is measured as the probe of SlipstreamAttention measures a kernel's. This
is nobody's kernel: it has no speed and says nothing about SageAttention or the others, only which
probe error goes with which loss of quality, on this model.
"""

import statistics
from typing import Any

from torch import Tensor

from ..backends.attention.config import AttentionConfig
from ..backends.attention.probe import Verdict, probe
from .quality_report import Lab
from .scores import score

BITS = (8, 6, 5, 4, 3)
NUM_PICTURES, _BATCH = 40, 40
TITLE = "Attention: how much probe error a picture bears"


def curves(lab: Lab) -> list[dict[str, Any]]:
    """One curve over the bits of q, k and v."""
    plain, _ = lab.demo.pictures(NUM_PICTURES, batch=_BATCH)
    lab.bar.reset(total=len(BITS))
    lab.bar.set_description("attention")
    points = []
    for bits in BITS:
        rounded = RoundedAttention(bits)
        model = lab.demo.model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = rounded
        pictures, _ = lab.demo.pictures(NUM_PICTURES, batch=_BATCH, model=model)
        points.append(score(f"{bits} bits", pictures, plain) | rounded.errors())
        lab.bar.update()
    limits = AttentionConfig()
    return [
        {
            "title": TITLE,
            "about": "q, k and v rounded to so many bits in every call of every step, with torch's "
            "own attention: no kernel, no speed. The probe's default limits are a relative error "
            f"of {limits.max_rel_l1:g} and a cosine of {limits.min_cos:g}. "
            f"{NUM_PICTURES} pictures in one batch.",
            "columns": {
                "rel_l1": "probe error, median",
                "rel_l1_worst": "worst",
                "passed": "share passed",
            },
            "points": points,
        }
    ]


class RoundedAttention:
    """An optimized_attention_override that rounds q, k and v and keeps every call's verdict."""

    def __init__(self, bits: int):
        self._levels = 2 ** (bits - 1) - 1
        self.verdicts: list[Verdict] = []

    def __call__(
        self, attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert kwargs.get("skip_reshape"), "Flux hands over [batch, heads, tokens, dim]"
        out = attention(*(self._round(x) for x in (q, k, v)), heads, *args, **kwargs)
        split = out.unflatten(-1, (heads, -1)).transpose(1, 2)
        self.verdicts.append(probe(split, q, k, v, mask=None, scale=None))
        return out

    def _round(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / self._levels
        return (x / scale).round() * scale

    def errors(self) -> dict[str, Any]:
        """Of all calls so far: the probe error's median and maximum, how many pass the limits."""
        limits = AttentionConfig()
        errors = [verdict.rel_l1 for verdict in self.verdicts]
        passed = [v.against(limits.max_rel_l1, limits.min_cos) is None for v in self.verdicts]
        return {
            "rel_l1": round(statistics.median(errors), 4),
            "rel_l1_worst": round(max(errors), 4),
            "passed": round(sum(passed) / len(passed), 4),
        }
