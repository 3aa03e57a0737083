"""One attention call shared by ranks: heads for tokens (Ulysses), then ring where it is on.

Sits as `optimized_attention_override` for one model call. Every rank gives its tokens of all
heads and gets all tokens of its heads, attends with whatever kernel was set before (the override
it found, else ComfyUI's), and gives the result back. Tokens are put into canonical order first,
so that masks and sparse kernels stay valid. Rows are [B,N,H,D] while they travel.
Source: Ulysses, arXiv 2309.14509; uneven rows and heads and replicated streams are ours.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..backends.architectures import find, whole_sequence
from .mesh import Mesh
from .ring import partial_attention, ring_attention
from .shards import Arrangement, even_split, pick

if TYPE_CHECKING:
    from .engine import Call

Attention = Callable[..., torch.Tensor]


class SharedAttention:
    """The override of one Call. `previous`: the override it replaces for this call, or None."""

    def __init__(self, call: "Call", previous: Attention | None = None):
        self.call, self.previous = call, previous

    def __call__(
        self,
        func: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        def inner(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self.previous is not None:
                return self.previous(func, *args, attn_precision=attn_precision, **kwargs)
            return func(*args, attn_precision=attn_precision, **kwargs)

        call = self.call
        if call.attention_is_local():
            call.num_local += 1
            return inner(
                q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape, **options,
            )  # fmt: skip
        call.num_exchanged += 1
        q, k, v = rows_of(q, k, v, heads, skip_reshape=skip_reshape)
        out = self._shared(inner, q, k, v, mask, options)
        if skip_output_reshape:
            return out.transpose(1, 2)
        return out.reshape(out.shape[0], out.shape[1], -1)

    def _shared(
        self,
        inner: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The call's output rows [B,N_local,H,D] from its local rows."""
        call, mesh = self.call, self.call.mesh
        q_layout, k_layout = call.layouts_of(q.shape[1], k.shape[1])
        q_plan, k_plan = call.arrangement(q_layout), call.arrangement(k_layout)
        mask = call.whole_mask(mask, q_layout, k_layout)
        if k.shape[2] != q.shape[2] and k.shape[2] < mesh.ulysses:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
            options = {name: o for name, o in options.items() if name != "enable_gqa"}
        split, kv_split = split_heads(q.shape[2], k.shape[2], mesh.ulysses)
        mine = mesh.ulysses_rank
        if mask is not None and mask.shape[1] > 1:
            mask = mask.narrow(1, sum(split[:mine]), split[mine])
        with call.clock.measure("exchange"):
            waiting = [
                scatter(mesh, q, split, q_plan, is_query=True),
                scatter(mesh, k, kv_split, k_plan, is_query=False),
                scatter(mesh, v, kv_split, k_plan, is_query=False),
            ]
            q, k, v = (finish() for finish in waiting)
        if mesh.ring > 1:
            out = self._ring(q, k, v, mask, options, q_plan, k_plan)
        else:
            out = self._whole(inner, q, k, v, mask, options, q_plan, k_plan)
        with call.clock.measure("exchange"):
            return collect(mesh, out, split, q_plan)

    def _whole(
        self,
        inner: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
        q_plan: Arrangement,
        k_plan: Arrangement,
    ) -> torch.Tensor:
        """Attention over all tokens of this rank's heads, rows in the order they came."""
        if q.shape[2] == 0:
            return q.new_zeros((q.shape[0], q.shape[1], 0, v.shape[3]))
        if q_plan.to_canonical is not None:
            q = pick(q, 1, q_plan.to_canonical)
        if k_plan.to_canonical is not None:
            k, v = (pick(t, 1, k_plan.to_canonical) for t in (k, v))
        out = inner(
            *(t.transpose(1, 2) for t in (q, k, v)), q.shape[2],
            mask=mask, skip_reshape=True, skip_output_reshape=True, **options,
        ).transpose(1, 2)  # fmt: skip
        return out if q_plan.to_canonical is None else pick(out, 1, q_plan.gathered)

    def _ring(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
        q_plan: Arrangement,
        k_plan: Arrangement,
    ) -> torch.Tensor:
        mesh = self.call.mesh
        assert mesh.keys is not None
        if mask is not None and mask.shape[-2] > 1:
            mask = pick(mask, -2, q_plan.queries(mesh.ring_rank))
        out = ring_attention(
            q.transpose(1, 2), k, v, group=mesh.keys, mask=mask, scale=options.get("scale"),
            keys=[k_plan.keys(c) for c in range(mesh.ring)], attend=partial_attention,
        )  # fmt: skip
        return out.transpose(1, 2)


def options_of_part(
    network: torch.nn.Module, options: Mapping[str, Any], attention: SharedAttention
) -> dict[str, Any]:
    """transformer_options of this rank's part of a call: ComfyUI prefetches nothing, keeps no keys
    from call to call (each rank has its own part of them), and attention is `attention`."""
    # A rank that leaves a call early (EarlyExit) would leave staged weights in ComfyUI's queue.
    ours = {"optimized_attention_override": attention, "prefetch_dynamic_vbars": False}
    return whole_sequence(find(network), {**options, **ours})


def rows_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *, skip_reshape: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B,N,H,D], k and v [B,N,Hkv,D] from any form ComfyUI 0.33 passes (SD3: 3-D q, 4-D k)."""
    if skip_reshape:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    head_dim = q.shape[-1] if q.ndim == 4 else q.shape[-1] // heads

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t if t.ndim == 4 else t.reshape(t.shape[0], t.shape[1], -1, head_dim)

    return rows(q), rows(k), rows(v)


def split_heads(
    num_heads: int, num_kv_heads: int, num_parts: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key heads of every part; a key head stays with the query heads that share it."""
    kv_split = even_split(num_kv_heads, num_parts)
    return tuple(n * (num_heads // num_kv_heads) for n in kv_split), kv_split


def scatter(
    mesh: Mesh,
    rows: torch.Tensor,
    split: tuple[int, ...],
    plan: Arrangement,
    *,
    is_query: bool,
) -> Callable[[], torch.Tensor]:
    """Start to turn local rows of all heads into the chunk's rows of this rank's heads.

    rows [B,N_local,H,D]; the returned function waits and gives [B,N_chunk,h,D]: the ranks' rows
    in rank order, then replicated ones (keys: only on ring chunk 0, so that they count once).
    """
    mine = mesh.ulysses_rank
    own = pick(rows, 1, plan.own)
    extra = None
    if plan.extra and (is_query or mesh.ring_rank == 0):
        extra = pick(rows, 1, plan.extra).narrow(2, sum(split[:mine]), split[mine])
    pending = None
    if mesh.heads is not None:
        shapes = [[rows.shape[0], plan.rows[r], split[mine], rows.shape[3]] for r in mesh.chunk]
        pending = mesh.heads.exchange(own.split(split, 2), shapes)

    def finish() -> torch.Tensor:
        chunk = own if pending is None else pending.joined(1)
        return chunk if extra is None else torch.cat((chunk, extra), 1)

    return finish


def collect(
    mesh: Mesh, out: torch.Tensor, split: tuple[int, ...], plan: Arrangement
) -> torch.Tensor:
    """The reverse of scatter for queries: [B,N_chunk,h,D] -> local rows [B,N_local,H,D]."""
    rows = [plan.rows[r] for r in mesh.chunk]
    my_rows = rows[mesh.ulysses_rank]
    if mesh.heads is not None:
        parts = list(out.split([*rows, plan.num_replicated], 1))
        extra = parts.pop()
        if plan.num_replicated:
            parts = [torch.cat((part, extra), 1) for part in parts]
        length = my_rows + plan.num_replicated
        shapes = [[out.shape[0], length, heads, out.shape[3]] for heads in split]
        out = torch.cat(mesh.heads.exchange(parts, shapes).wait(), 2)
    if not plan.num_replicated:
        return out
    places, at, extra_at = [], 0, my_rows
    for length, is_replicated in plan.segments:
        places.append((extra_at if is_replicated else at, length))
        extra_at, at = (extra_at + length, at) if is_replicated else (extra_at, at + length)
    return pick(out, 1, places)
