"""One quantised layer: x through its segments, with the terms that patches add.

Segments below each other give parts of the output, segments side by side are added. What a layer
needs for one run only (LoRA terms in 16 bits, shared activations) lives in a Session, which the
run's end empties.
"""

from collections.abc import Callable
from typing import Any

import torch

from .casts import narrowed, segment_in
from .kernels import Kernel, LowRank
from .terms import Terms
from .weight import QuantWeight, Segment

KernelOf = Callable[[Segment, torch.Tensor], Kernel]


class Session:
    """What quantised layers keep during one sampling run."""

    def __init__(self) -> None:
        self.terms: dict[Any, Terms | None] = {}
        self.ran: dict[str, set[str]] = {}  # layer -> ids of the kernels that computed it
        self._shared: SharedInput | None = None

    def share(self, x: torch.Tensor, segment: Segment, layer: Any) -> "SharedInput | None":
        """A place for the quantised x, if the layer is one of several that quantise it alike."""
        facts = segment.facts
        if not facts.shared:
            self._shared = None
            return None
        if self._shared is None or not self._shared.fits(x, facts.shared, layer):
            self._shared = SharedInput(x, facts.shared, facts.num_sharing)
        shared = self._shared
        shared.take(layer)
        if not shared.left:
            self._shared = None  # the last one: nothing holds the input any longer
        return shared

    def clear(self) -> None:
        self.terms.clear()
        self._shared = None


class SharedInput:
    """The quantised activations of one input, for each of its layers once.

    Holds the input itself, so that its identity cannot be reused; a layer that comes back gets a
    new one, since inference tensors do not tell whether they were written to.
    """

    def __init__(self, x: torch.Tensor, group: int, num_layers: int):
        self.x, self.group, self.left = x, group, num_layers
        self.layers: list[Any] = []
        self.value: Any | None = None

    def fits(self, x: torch.Tensor, group: int, layer: Any) -> bool:
        known = any(layer is other for other in self.layers)
        return self.x is x and self.group == group and not known and self.left > 0

    def take(self, layer: Any) -> None:
        self.layers.append(layer)
        self.left -= 1

    def get(self) -> Any | None:
        return self.value

    def put(self, value: Any) -> None:
        self.value = value


def linear(
    x: torch.Tensor,
    weight: QuantWeight,
    bias: torch.Tensor | None,
    kernel_of: KernelOf,
    *,
    compute: torch.dtype | None = None,
    terms: Terms | None = None,
    session: Session | None = None,
    layer: Any = None,
) -> torch.Tensor:
    """y [..., N] in x's dtype for x [..., K].

    compute: the dtype of the matmuls, None for the segments' own; terms are in it, on x's device.
    """
    num_rows, num_columns = weight.shape
    dtype = compute or weight.segments[0].dtype
    flat = narrowed(x.reshape(-1, num_columns), dtype)
    weight = QuantWeight(weight.shape, tuple(segment_in(s, dtype) for s in weight.segments))
    bias = None if bias is None else narrowed(bias, dtype)
    scaled = flat if terms is None or terms.in_factor is None else flat * terms.in_factor
    fused = terms is not None and terms.out_factor is None and terms.in_factor is None
    pair = terms.pair if terms is not None and fused else None
    late_bias = terms is not None and terms.out_factor is not None
    own_input = terms is not None and terms.in_factor is not None
    y = _segments(
        scaled,
        weight,
        None if late_bias else bias,
        kernel_of,
        pair,
        None if session is None or own_input else lambda s: session.share(x, s, layer),
    )
    if terms is not None:
        y = _with_terms(y, flat, terms, bias if late_bias else None, fused)
    return y.to(x.dtype).reshape(*x.shape[:-1], num_rows)


def _with_terms(
    y: torch.Tensor, x: torch.Tensor, terms: Terms, bias: torch.Tensor | None, fused: bool
) -> torch.Tensor:
    if terms.out_factor is not None and terms.out_bias is not None:
        y = y * terms.out_factor + terms.out_bias
        y = y if bias is None else y.add_(bias)
    if terms.pair is not None and not fused:
        y = y + (x @ terms.pair.down) @ terms.pair.up.t()
    for other in terms.others:
        other.add_to(y, x)
    return y


def _segments(
    x: torch.Tensor,
    weight: QuantWeight,
    bias: torch.Tensor | None,
    kernel_of: KernelOf,
    pair: LowRank | None,
    share: Callable[[Segment], SharedInput | None] | None,
) -> torch.Tensor:
    parts: dict[int, torch.Tensor] = {}
    for segment in weight.segments:
        facts = segment.facts
        rows = slice(facts.row, facts.row + facts.num_rows)
        columns = slice(facts.column, facts.column + facts.num_columns)
        first = facts.row not in parts
        part_bias = bias[rows].contiguous() if first and bias is not None else None
        extra = None
        if pair is not None:
            extra = LowRank(pair.down[columns].contiguous(), pair.up[rows].contiguous())
        inputs = x[:, columns].contiguous()
        if not inputs.shape[0]:
            y = x.new_zeros(0, facts.num_rows)
        else:
            y = kernel_of(segment, inputs).run(
                inputs,
                segment,
                bias=part_bias,
                extra=extra,
                share=None if share is None else share(segment),
            )
        parts[facts.row] = y if first else parts[facts.row].add_(y)
    if len(parts) == 1:
        return parts[0]
    return torch.cat([parts[row] for row in sorted(parts)], 1)
