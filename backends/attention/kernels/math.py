"""Plain attention: exact, on any device, for any call. The last resort on a GPU, SDPA on a CPU.

Scores exist for a bounded slice at a time (256 MB), accumulated in fp32 (fp64 for fp64 inputs).
A row that attends to nothing is zero, as in torch's SDPA; its log-sum-exp is -inf.
"""

import torch
from torch.nn import functional

from ..request import Request
from . import operands, rules
from .base import EXACT

SCORES_BYTES = 256 * 2**20


class Math:
    """Softmax of q k^T times v, sliced over heads and query rows."""

    id, category, lse, sparse, pip = "math", EXACT, True, False, ""

    def available(self) -> str | None:
        return None

    def ineligible(self, request: Request) -> str | None:
        return rules.gqa(self.id, request)

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
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if q.device.type == "cpu" and not want_lse:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        if q.device.type == "cpu" and mask is None and v.shape[-1] == q.shape[-1]:
            k, v = operands.expand_kv(k, q.shape[1]), operands.expand_kv(v, q.shape[1])
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=None, scale=scale
            )
            return out, lse.float()
        out, lse = sliced_attention(q, k, v, mask, scale)
        return (out, lse) if want_lse else out


def sliced_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    scores_bytes: int = SCORES_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B,H,Nq,Dv], lse fp32 [B,H,Nq]) with at most about `scores_bytes` of scores at once."""
    batch, heads, q_tokens, _ = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    group = heads // kv_heads
    work = torch.promote_types(q.dtype, torch.float32)
    row_bytes = k_tokens * group * work.itemsize
    rows = max(1, min(q_tokens, scores_bytes // row_bytes))
    kv_step = max(1, min(kv_heads, scores_bytes // (row_bytes * rows)))
    out = q.new_empty((batch, heads, q_tokens, v.shape[-1]))
    lse = q.new_empty((batch, heads, q_tokens), dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(batch, heads, q_tokens, k_tokens)
    for b in range(batch):
        for g in range(0, kv_heads, kv_step):
            keys = k[b, g : g + kv_step, None].to(work)  # [G,1,Nk,D]
            values = v[b, g : g + kv_step, None].to(work)
            some = slice(g * group, (g + kv_step) * group)
            for r in range(0, q_tokens, rows):
                cut = (b, some, slice(r, r + rows))
                queries = q[cut].unflatten(0, (-1, group)).to(work) * scale
                scores = queries @ keys.transpose(-1, -2)  # [G,group,rows,Nk]
                if mask is not None:
                    scores += operands.additive(mask[cut], work).unflatten(0, (-1, group))
                total = torch.logsumexp(scores, -1, keepdim=True)
                weights = scores.sub_(total).exp_()
                if mask is not None:
                    weights = weights.masked_fill_(total == float("-inf"), 0.0)
                out[cut] = (weights @ values).flatten(0, 1).to(out.dtype)
                lse[cut] = total.squeeze(-1).flatten(0, 1).float()
    return out, lse
