"""Ring attention: keys and values pass from chunk to chunk, partial results merge by log-sum-exp.

Shapes: q [B,H,Nq,D], k and v [B,N,Hkv,D] (rows first, as they travel), lse fp32 [B,H,Nq].
Source: Ring Attention, arXiv 2310.01889; the merge is that of FlashAttention's split keys.
"""

from collections.abc import Callable, Sequence

import torch

from .comm import Group, Pending
from .shards import Span, pick

Partial = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (q, k, v, mask=, scale=) -> out, lse


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Group,
    keys: Sequence[tuple[Span, ...]],
    mask: torch.Tensor | None,
    scale: float | None,
    attend: Partial,
) -> torch.Tensor:
    """Attention of this rank's queries to all chunks' keys, [B,H,Nq,D].

    keys: canonical spans of every chunk's keys, to read the columns of `mask` by; the group's
    rank is the number of the chunk that k and v hold now. Sends k and v world - 1 times.
    """
    world, me = group.world, group.rank
    out, lse = None, None
    for turn in range(world):
        source = (me - turn) % world
        passing = None
        if turn < world - 1:
            length = sum(n for _, n in keys[(source - 1) % world])
            passing = [_pass_on(group, rows, length) for rows in (k, v)]
        columns = mask
        if mask is not None and mask.shape[-1] > 1:
            columns = pick(mask, -1, keys[source])
        one_out, one_lse = attend(q, *_as_heads(k, v, q.shape[1]), mask=columns, scale=scale)
        out, lse = merge(out, lse, one_out, one_lse)
        if passing is not None:
            with group.clock.measure("exchange"):
                k, v = (p.wait()[(me - 1) % world] for p in passing)
    assert out is not None
    return out.to(q.dtype)


def merge(
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    other: torch.Tensor,
    other_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from the attention over each; fp32.

    A row without keys has lse -inf and counts for nothing, whatever its values are.
    """
    other, other_lse = other.float(), other_lse.float()
    empty = other_lse.isneginf().unsqueeze(-1)
    other = other.masked_fill(empty, 0.0)
    if out is None or lse is None:
        return other, other_lse
    total = torch.logaddexp(lse, other_lse)
    weight = torch.exp(lse - total).nan_to_num(0.0).unsqueeze(-1)
    other_weight = torch.exp(other_lse - total).nan_to_num(0.0).unsqueeze(-1)
    return out * weight + other * other_weight, total


def _pass_on(group: Group, rows: torch.Tensor, length: int) -> Pending:
    """Send rows to the next chunk; receive `length` rows from the one before."""
    parts: list[torch.Tensor | None] = [None] * group.world
    shapes: list[list[int] | None] = [None] * group.world
    parts[(group.rank + 1) % group.world] = rows
    shapes[(group.rank - 1) % group.world] = [rows.shape[0], length, *rows.shape[2:]]
    return group.exchange(parts, shapes)


def _as_heads(k: torch.Tensor, v: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    """k and v as [B,H,N,D], repeated where several query heads share one."""
    found = []
    for rows in (k, v):
        heads = rows.transpose(1, 2)
        if heads.shape[1] not in (0, num_heads):
            heads = heads.repeat_interleave(num_heads // heads.shape[1], 1)
        found.append(heads)
    return found


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention with its log-sum-exp, in fp32 where no fused op gives one."""
    if q.shape[1] == 0 or q.shape[2] == 0 or k.shape[2] == 0:
        nothing = torch.full(q.shape[:3], float("-inf"), device=q.device)
        return q.new_zeros((*q.shape[:3], v.shape[-1])), nothing
    additive = mask
    if mask is not None and mask.dtype == torch.bool:
        additive = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        additive = additive.masked_fill(~mask, float("-inf"))
    scores = (q.float() @ k.float().transpose(-1, -2)) * (scale or q.shape[-1] ** -0.5)
    if additive is not None:
        scores = scores + additive.float()
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    return (weights @ v.float()).to(q.dtype), lse
