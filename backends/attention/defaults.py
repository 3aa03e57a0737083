"""What answers a call that no kernel of ours takes, and whether that is exact.

It is the override that was there before us, the attention that the checkpoint itself prefers in
this layer (ComfyUI 0.40 and later), or ComfyUI's function of this process.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import host
from .entry import DEFAULT, Fallback
from .layout import Views
from .places import Place

Attention = Callable[..., torch.Tensor]

EXACT, APPROXIMATE, UNKNOWN = "exact", "approximate", "unknown"
# ComfyUI's functions and our own; a function of any other name may compute anything.
EXACT_FUNCTIONS = frozenset(
    {
        "attention_pytorch",
        "attention_xformers",
        "attention_flash",
        "attention_basic",
        "attention_split",
        "attention_sub_quad",
        "attention_sdpa",
        "attention_plain",
    }
)
APPROXIMATE_FUNCTIONS = frozenset(
    {"attention_comfy_kitchen_int8", "attention_sage", "attention3_sage"}
)
# Of a call's keywords: those that say what is computed, not how its tensors lie.
_MEANING = ("scale", "enable_gqa", "low_precision_attention", "attn_precision",
            "_inside_attn_wrapper", "transformer_options")  # fmt: skip


def accuracy_of(function: Attention) -> str:
    """EXACT, APPROXIMATE or UNKNOWN, by the function's name."""
    name = getattr(function, "__name__", "")
    if name in EXACT_FUNCTIONS:
        return EXACT
    return APPROXIMATE if name in APPROXIMATE_FUNCTIONS else UNKNOWN


class Defaults:
    """The defaults of one run.

    previous: the override found when the node was applied; preferred: by block, the attention
    that the checkpoint asks for; exact_only: the user asks for exact attention in spite of it.
    """

    def __init__(
        self,
        previous: Attention | None,
        preferred: Mapping[Place, Attention],
        *,
        exact_only: bool = False,
    ):
        self.previous, self._exact_only = previous, exact_only
        self._target = host.override_target(previous) if previous is not None else None
        self._preferred = preferred

    def function(self, func: Attention, place: Place) -> Attention:
        """ComfyUI's function `func`, or the one that the checkpoint prefers at `place`."""
        return self._preferred.get(place, func) if self._preferred else func

    def name(self, func: Attention) -> str:
        """Of what answers, for reports: 'pytorch', or 'KJNodes.nodes.patch'."""
        if self.previous is not None and self._target is None:
            return host.qualified_name(self.previous)
        return self._named(func).removeprefix("attention_") or "default"

    def accuracy(self, func: Attention) -> str:
        """Of what answers: EXACT, APPROXIMATE or UNKNOWN."""
        if self.previous is not None and self._target is None:
            return UNKNOWN
        return accuracy_of(self._target or func)

    def fallback(self, func: Attention, options: Mapping[str, Any]) -> Fallback:
        """The default on views of a call (or of some of its heads). options: its keywords."""
        kept = {name: options[name] for name in _MEANING if name in options}
        previous = self.previous

        def run(views: Views) -> torch.Tensor:
            num_heads = views.q.shape[1]
            call = (views.q, views.k, views.v, num_heads)
            layout = {"mask": views.mask, "skip_reshape": True, "skip_output_reshape": True}
            if previous is None:
                return func(*call, **layout, **kept)
            return previous(func, *call, **layout, **kept)

        earlier = "" if previous is None else f"|{host.qualified_name(previous)}"
        name = f"{DEFAULT}:{self._named(func)}{earlier}"
        is_asked_for = previous is None and func in self._preferred.values()
        may_stay = self.accuracy(func) == EXACT or (is_asked_for and not self._exact_only)
        return Fallback(run, name, may_stay)

    def _named(self, func: Attention) -> str:
        return str(getattr(self._target or func, "__name__", "default"))
