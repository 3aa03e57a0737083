"""Ring attention: keys and values pass from chunk to chunk, partial results merge by log-sum-exp.

Shapes: q [B,H,Nq,D], k and v [B,N,Hkv,D] (rows first, as they travel), lse fp32 [B,H,Nq].
Source: Ring Attention, arXiv 2310.01889; the merge is that of FlashAttention's split keys.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from ..backends.attention.kernels.base import Kernel
from ..backends.attention.kernels.table import KERNELS
from ..backends.attention.layout import Views, request_of
from ..backends.attention.request import Request
from ..backends.registry import Choice, select
from .comm import Group, Pending
from .shards import Span, pick

# Kernels that give a log-sum-exp, best first. On a GPU: unverified.
_ORDER = ("flash_sdpa", "efficient", "flash2", "flash3", "math")

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
        keys_now, values_now = k.transpose(1, 2), v.transpose(1, 2)
        one_out, one_lse = attend(q, keys_now, values_now, mask=columns, scale=scale)
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
    empty = other_lse.isneginf() | other_lse.isnan()
    other = other.masked_fill(empty.unsqueeze(-1), 0.0)
    other_lse = other_lse.masked_fill(empty, float("-inf"))
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


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention (out, lse) by the first kernel that gives the log-sum-exp of such a call.

    q [B,H,Nq,D], k and v [B,Hkv,Nk,D]. Without heads, queries or keys: zeros and -inf.
    """
    if not (q.shape[1] and q.shape[2] and k.shape[2]):
        nothing = torch.full(q.shape[:3], float("-inf"), device=q.device)
        return q.new_zeros((*q.shape[:3], v.shape[-1])), nothing
    request = request_of(Views(q, k, v, mask, scale), want_lse=True)
    found = _kernel_for(request).run(q, k, v, mask=mask, scale=scale, want_lse=True)
    assert isinstance(found, tuple)
    return found


@cache
def _kernel_for(request: Request) -> Kernel:
    choice = select([KERNELS[name] for name in _ORDER], request)
    assert isinstance(choice, Choice), choice  # math takes everything
    return choice.candidate
