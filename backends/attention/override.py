"""The `optimized_attention_override` on a MODEL: static, stateless, chained to the one it found.

It finds the run's BoundCall in the model call's own transformer_options; without one (a model
that is called outside a sampling run) it is transparent.
"""

from functools import partial
from typing import Any

import torch

from .. import host
from .defaults import Attention
from .dispatch import BoundCall
from .places import NO_PLACE, place_in

BOUND = "slipstream.attention.call"  # transformer_options key: the BoundCall of this model call


class Override:
    """Takes the calls a kernel answers; hands the others to `previous`, else to ComfyUI's."""

    def __init__(self, previous: Attention | None):
        self.previous = previous

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
        **kwargs: Any,
    ) -> torch.Tensor:
        options = kwargs.get("transformer_options") or {}
        if torch.compiler.is_compiling():
            return self._traced(
                func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape,
                options, kwargs,
            )  # fmt: skip
        call: BoundCall | None = options.get(BOUND)
        key = None
        if call is not None and not call.inside:
            key = call.key(q, k, mask, skip_reshape, options, kwargs)
            func = call.function(key, func)
            if call.declines(key):
                key = None
        if key is None and self.previous is None:  # most calls: nothing is built on the way
            return func(
                q, k, v, heads, mask=mask, attn_precision=attn_precision,
                skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip
        layout = {
            "mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
        }  # fmt: skip
        default = partial(self._pass_on, call, func, q, k, v, heads, layout, kwargs)
        if key is None:
            return default()
        assert call is not None
        return call.attend(
            key, func, q, k, v, heads, mask, skip_reshape, skip_output_reshape, kwargs, default
        )

    def _pass_on(
        self,
        call: BoundCall | None,
        func: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        layout: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The call as it came, to the override that was there before us, else to ComfyUI's."""
        if self.previous is None:
            return func(q, k, v, heads, **layout, **kwargs)
        if call is None:
            return self.previous(func, q, k, v, heads, **layout, **kwargs)
        inside, call.inside = call.inside, True
        try:
            return self.previous(func, q, k, v, heads, **layout, **kwargs)
        finally:
            call.inside = inside

    def _traced(
        self,
        func: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None,
        attn_precision: torch.dtype | None,
        skip_reshape: bool,
        skip_output_reshape: bool,
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        place = place_in(options, None)
        block_type, index = ("", 0) if place == NO_PLACE else place
        return torch.ops.slipstream.attention(
            q, k, v, mask, heads, skip_reshape, skip_output_reshape, kwargs.get("scale"),
            kwargs.get("enable_gqa", False),
            kwargs.get("low_precision_attention", True) is not False, attn_precision,
            block_type, index, func.__name__,
        )  # fmt: skip

    def container_function(
        self,
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Calls with q, k, v in containers that their consumer empties early.

        MiniMax-H3 makes them, from ComfyUI 0.40 on every model. A call that is known to be
        ComfyUI's own keeps its containers; the others are unpacked.
        """
        function = host.attention_function(None)
        assert function is not None
        layout = {
            "mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
        }  # fmt: skip
        options = kwargs.get("transformer_options") or {}
        call: BoundCall | None = options.get(BOUND)
        compiling = torch.compiler.is_compiling()
        if self.previous is None and not compiling and (call is None or call.inside):
            return function(q, k, v, heads, **layout, **kwargs)
        if self.previous is None and not compiling and call is not None:
            ordinals = dict(call.ordinals)
            key = call.key(q.peek(), k.peek(), mask, skip_reshape, options, kwargs)
            if call.declines(key):
                return call.function(key, function)(q, k, v, heads, **layout, **kwargs)
            call.ordinals = ordinals  # the same call comes again, with tensors
        return self(function, q.take(), k.take(), v.take(), heads, **layout, **kwargs)
