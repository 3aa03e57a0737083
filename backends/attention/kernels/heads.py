"""Attention a few heads at a time, so that a kernel's copies of q, k and v stay small.

Quantised kernels make INT8 and FP16 copies of whole tensors: 1.2 to 3.1 GB for one call of Wan at
720p (75,600 tokens, 40 heads of 128), beside an output of 0.8 GB. Heads do not depend on each
other, so groups of them give the same numbers with that much less.
"""

from collections.abc import Callable

import torch

WORKSPACE_BYTES = 256 * 2**20  # beyond it, heads are split; each part still fills a GPU

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def in_groups(
    attention: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    workspace_bytes: float,
    most_bytes: int | None = None,
) -> torch.Tensor:
    """attention(q, k, v, mask) [B,H,Nq,D], over groups of heads if it would need too much memory.

    workspace_bytes: what it needs for all heads; most_bytes: what it may need at once, by default
    WORKSPACE_BYTES. One k/v head with its q heads is the smallest group. In groups, the output is
    dense as [B,Nq,H,D], which most models ask for.
    """
    kv_heads = k.shape[1]
    most = WORKSPACE_BYTES if most_bytes is None else most_bytes
    num_groups = min(kv_heads, int(-(-workspace_bytes // max(most, 1))))
    if num_groups <= 1:
        return attention(q, k, v, mask)
    batch, heads, q_tokens, _ = q.shape
    each, per_kv_head = -(-kv_heads // num_groups), heads // kv_heads
    out = q.new_empty((batch, q_tokens, heads, v.shape[-1])).transpose(1, 2)
    for first in range(0, kv_heads, each):
        of_kv = slice(first, first + each)
        of_q = slice(first * per_kv_head, (first + each) * per_kv_head)
        own = mask
        if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
            own = mask[..., of_q, :, :]
        out[:, of_q] = attention(q[:, of_q], k[:, of_kv], v[:, of_kv], own)
    return out
