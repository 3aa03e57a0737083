"""Attention inside compiled graphs: a custom op whose decision is taken when the graph runs.

torch.compile freezes what traced Python decides, and one graph serves every clone of a model and
every model of the same class (torch 2.11: weights are graph inputs, and ComfyUI 0.33 filters the
guards on transformer_options), so a graph must name neither a run nor a model. The op therefore
carries only the call; which run answers is looked up by device at run time, where `bound` put it
for the duration of one model call. An unbound op computes the default function.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .. import host
from .kernels.table import KERNELS
from .layout import read_call, write_output

# The one table that compiled graphs can reach; an entry exists only while a model call runs.
_bound: dict[torch.device, Any] = {}


@contextmanager
def bound(device: torch.device, call: Any) -> Iterator[None]:
    """Compiled graphs running on `device` ask `call` (a BoundCall) within this context."""
    before = _bound.get(device)
    _bound[device] = call
    try:
        yield
    finally:
        if before is None:
            _bound.pop(device, None)
        else:
            _bound[device] = before


@cache
def register() -> None:
    """Make torch.ops.slipstream.attention exist. Called when a node is applied, not at import."""
    # Which kernel runs is decided anew in every step: it may not be frozen in a CUDA graph.
    options: dict[str, Any] = {}
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch 2.9 and later
    if unsafe is not None and "tags" in inspect.signature(torch.library.custom_op).parameters:
        options["tags"] = (unsafe,)
    op = torch.library.custom_op("slipstream::attention", _attention, mutates_args=(), **options)
    op.register_fake(_attention_shape)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    scale: float | None,
    enable_gqa: bool,
    low_precision: bool,
    attn_precision: torch.dtype | None,
    block_type: str,
    block_index: int,
    default_name: str,
) -> torch.Tensor:
    options: dict[str, Any] = {"low_precision_attention": low_precision}
    if scale is not None:
        options["scale"] = scale
    if enable_gqa:
        options["enable_gqa"] = True
    layout: dict[str, Any] = {
        "skip_reshape": skip_reshape,
        "skip_output_reshape": skip_output_reshape,
        "attn_precision": attn_precision,
    }
    function = default_function(default_name)
    call = _bound.get(q.device)
    if call is None:
        return _own(function(q, k, v, heads, mask=mask, **layout, **options), q)
    ids = {"block_type": block_type, "block_index": block_index} if block_type else {}
    # What other overrides read: a graph carries no dict, the binding has the call's own.
    options |= {"transformer_options": {**call.options, **ids}, "_inside_attn_wrapper": True}
    key = call.key(q, k, mask, skip_reshape, ids, options)
    function = call.function(key, function)

    def default() -> torch.Tensor:
        previous = call.owner.defaults.previous
        if previous is not None:
            return previous(function, q, k, v, heads, mask=mask, **layout, **options)
        return function(q, k, v, heads, mask=mask, **layout, **options)

    if call.declines(key):
        return _own(default(), q)
    out = call.attend(
        key, function, q, k, v, heads, mask, skip_reshape, skip_output_reshape, options, default
    )
    return _own(out, q)


def default_function(name: str) -> Callable[..., torch.Tensor]:
    """ComfyUI's function of this name, else its exact one; plain attention without a ComfyUI."""
    return (
        host.attention_function(name)
        or host.attention_function("attention_pytorch")
        or attention_plain
    )


def _own(out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that shares no memory with q: an op must not return its input."""
    out = out.contiguous()
    shares = out.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
    return out.clone() if shares else out


def _attention_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    *rest: Any,
) -> torch.Tensor:
    """Shape [B,Nq,H*Dv], or [B,H,Nq,Dv] with skip_output_reshape; contiguous."""
    batch, tokens = (q.shape[0], q.shape[2]) if q.ndim == 4 else (q.shape[0], q.shape[1])
    if v.ndim == 4:
        head_dim = v.shape[-1]
    else:
        head_dim = v.shape[-1] // heads
    if skip_output_reshape:
        return q.new_empty((batch, heads, tokens, head_dim))
    return q.new_empty((batch, tokens, heads * head_dim))


def attention_plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> torch.Tensor:
    """ComfyUI's default is not to be had by name (a graph of another process): exact attention."""
    views = read_call(
        q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
        enable_gqa=options.get("enable_gqa", False), scale=options.get("scale"),
    )  # fmt: skip
    out = KERNELS["math"].run(views.q, views.k, views.v, mask=views.mask, scale=views.scale)
    assert isinstance(out, torch.Tensor)
    return write_output(out, skip_output_reshape=skip_output_reshape)
