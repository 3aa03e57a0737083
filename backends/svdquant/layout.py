"""A QuantWeight as a tensor that ComfyUI moves, casts, pins and streams as one weight.

The registered layout of comfy-kitchen's QuantizedTensor: every part of every segment is a tensor
field, so that the memory manager's paths take all of them. There is no way back to 16 bits: what
would merge into or re-round the weight raises instead of erasing what it merged.
"""

import dataclasses
import functools
from typing import Any

import torch

from ..errors import SlipstreamError
from .weight import MAX_SEGMENTS, PARTS, Facts, QuantWeight, Segment

NAME = "SlipstreamSVDQ"
FROZEN = (
    "SVDQuant weights stay 4-bit: something tried to change a quantised layer directly. LoRA and "
    "other patches work through ComfyUI's loader nodes; model merges and saving do not."
)


class FrozenWeightError(SlipstreamError, ValueError):
    """Something asked for the 16-bit values of a quantised weight in order to change them."""


# (field name, segment, part) of every part that is not one of the two fixed fields
_FIELDS = tuple(
    (f"{part}{index}", index, part)
    for index in range(MAX_SEGMENTS)
    for part in PARTS
    if (index, part) not in ((0, "q"), (0, "scale"))
)
_PARTS_OF = tuple(
    tuple((part, name) for name, i, part in _FIELDS if i == index) for index in range(MAX_SEGMENTS)
)


@functools.cache
def registered() -> tuple[type, type]:
    """(QuantizedTensor, Params) with the layout registered, once per process."""
    from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
    from comfy_kitchen.tensor.base import BaseLayoutParams

    def tensor_fields(self: Any) -> list[str]:
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if isinstance(getattr(self, name), torch.Tensor)]

    params = dataclasses.make_dataclass(
        "Params",
        [
            ("facts", tuple, dataclasses.field(default=())),
            *((name, object, dataclasses.field(default=None)) for name, _, _ in _FIELDS),
        ],
        bases=(BaseLayoutParams,),
        frozen=True,
        namespace={"_tensor_fields": tensor_fields},
    )

    class SVDQuantLayout(QuantizedLayout):
        """See the module; registered under NAME."""

        Params = params
        QUANTIZES_INPUT = False

        @classmethod
        def quantize(cls, *args: Any, **kwargs: Any) -> Any:
            raise FrozenWeightError(FROZEN)

        @classmethod
        def dequantize(cls, *args: Any, **kwargs: Any) -> Any:
            raise FrozenWeightError(FROZEN)

        @classmethod
        def get_plain_tensors(cls, qtensor: Any) -> tuple[torch.Tensor, ...]:
            return (qtensor._qdata,)

        @classmethod
        def state_dict_tensors(cls, qdata: torch.Tensor, params: Any) -> dict[str, torch.Tensor]:
            named = {f"_{name}": getattr(params, name) for name in params._tensor_fields()}
            return {"": qdata, **named}

    register_layout_class(NAME, SVDQuantLayout)
    return QuantizedTensor, params


def wrap(weight: QuantWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a QuantizedTensor of shape [N, K] that says it has `dtype`."""
    assert len(weight.segments) <= MAX_SEGMENTS
    tensor_class, params_class = registered()
    first = weight.segments[0]
    parts = {
        name: getattr(weight.segments[index], part)
        for name, index, part in _FIELDS
        if index < len(weight.segments)
    }
    params = params_class(
        scale=first.scale,
        orig_dtype=dtype,
        orig_shape=tuple(weight.shape),
        facts=tuple(segment.facts for segment in weight.segments),
        **parts,
    )
    return tensor_class(first.q, NAME, params)


def unwrap(tensor: Any) -> QuantWeight:
    """The weight that `wrap` put into a QuantizedTensor, wherever it was moved since."""
    params = tensor._params
    segments = []
    for index, facts in enumerate(params.facts):
        parts = {part: getattr(params, name) for part, name in _PARTS_OF[index]}
        if index == 0:
            parts["q"], parts["scale"] = tensor._qdata, params.scale
        segments.append(Segment(facts, **parts))
    return QuantWeight(tuple(params.orig_shape), tuple(segments))


def is_quantised(value: Any) -> bool:
    """Whether a weight is one of ours."""
    return getattr(value, "_layout_cls", None) == NAME


def facts_of(tensor: Any) -> tuple[Facts, ...]:
    """The segments' facts of a wrapped weight."""
    return tensor._params.facts
