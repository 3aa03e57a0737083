"""Attention in fp32 on some query rows, and how far another result is from it.

As many heads at a time as a bounded slice of scores holds: all heads of a long video would need
gigabytes (256 rows x 75,600 keys x 40 heads: 3.1 GB; one head: 77 MB), while one at a time is a
dozen launches for each of a short image's heads.
"""

import math

import torch

SCORES_BYTES = 128 * 2**20


def evenly_spaced_rows(num_tokens: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Indices of `num_rows` query rows from the first to the last, or of all if there are fewer."""
    if num_tokens <= num_rows:
        return torch.arange(num_tokens, device=device)
    return torch.arange(num_rows, device=device) * (num_tokens - 1) // max(num_rows - 1, 1)


def reference_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """fp32 attention of q's `rows` over all keys: [B,H,len(rows),D].

    q [B,H,Nq,D]; k, v [B,Hkv,Nk,D]; mask None, bool (True = attend) or additive, broadcastable to
    [B,H,Nq,Nk]. A row that attends to nothing is zero, as in torch's SDPA.
    """
    batch, heads, q_tokens, head_dim = q.shape
    group = heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_empty((batch, heads, len(rows), v.shape[-1]), dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(batch, heads, q_tokens, k.shape[2])
    # Scores, and keys and values in fp32: what one k/v head and its group of q heads take.
    row_bytes = 4 * k.shape[2] * (group * len(rows) + head_dim + v.shape[-1])
    num_kv = max(1, SCORES_BYTES // row_bytes)
    for b in range(batch):
        for first in range(0, k.shape[1], num_kv):
            keys, values = (x[b, first : first + num_kv, None].float() for x in (k, v))
            some = slice(first * group, (first + num_kv) * group)
            queries = q[b, some][:, rows].float().unflatten(0, (-1, group)) * scale
            scores = queries @ keys.transpose(-1, -2)  # [G,group,rows,Nk]
            if mask is not None:
                scores = _masked(scores, mask[b, some][:, rows].unflatten(0, (-1, group)))
            weights = torch.softmax(scores, -1)
            if mask is not None:
                weights = weights.nan_to_num_(0.0)
            out[b, some] = (weights @ values).flatten(0, 1)
    return out


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, -math.inf)
    return scores.add_(mask)


def compare(out: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, bool]:
    """(mean absolute error relative to the reference's mean, cosine, all finite) of `out`.

    Both of one shape. Values that are not finite give (inf, 0, False). One device sync.
    """
    out, reference = out.float(), reference.float()
    error, total = (out - reference).abs().sum(), reference.abs().sum()
    dot, norms = (out * reference).sum(), out.norm() * reference.norm()
    error_, total_, dot_, norms_ = torch.stack((error, total, dot, norms)).tolist()
    if not all(math.isfinite(x) for x in (error_, total_, dot_, norms_)):
        return math.inf, 0.0, False
    if total_ == 0.0:
        return (0.0, 1.0, True) if error_ == 0.0 else (math.inf, 0.0, True)
    return error_ / total_, dot_ / norms_ if norms_ else 0.0, True
