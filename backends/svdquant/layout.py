"""A QuantWeight as a tensor that ComfyUI moves, casts, pins and streams as one weight.

The registered layout of comfy-kitchen's QuantizedTensor: its only tensor is the layer's buffer, so
that every path of the memory manager takes the whole layer in one piece. There is no way back to
16 bits: what would merge into or re-round the weight raises instead of erasing what it merged.
"""

import dataclasses
import functools
from typing import Any

import torch

from ..errors import SlipstreamError
from .buffer import Place, packed, unpacked
from .weight import MAX_SEGMENTS, QuantWeight

NAME = "SlipstreamSVDQ"
FROZEN = (
    "SVDQuant weights stay 4-bit: something tried to change a quantised layer directly. LoRA and "
    "other patches work through ComfyUI's loader nodes; model merges and saving do not."
)


class FrozenWeightError(SlipstreamError, ValueError):
    """Something asked for the 16-bit values of a quantised weight in order to change them."""


@functools.cache
def registered() -> tuple[type, type]:
    """(QuantizedTensor, Params) with the layout registered, once per process."""
    from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
    from comfy_kitchen.tensor.base import BaseLayoutParams

    def tensor_fields(self: Any) -> list[str]:
        return []

    params = dataclasses.make_dataclass(
        "Params",
        [("places", tuple, dataclasses.field(default=()))],
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
            return {"": qdata}

    register_layout_class(NAME, SVDQuantLayout)
    return QuantizedTensor, params


def wrap(weight: QuantWeight, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the weight as a QuantizedTensor of shape [N, K] that says it has `dtype`."""
    assert len(weight.segments) <= MAX_SEGMENTS
    buffer, places = packed(weight)
    return wrap_buffer(buffer, places, weight.shape, dtype)


def wrap_buffer(
    buffer: torch.Tensor, places: tuple[Place, ...], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The same from a weight's bytes, which are not copied."""
    tensor_class, params_class = registered()
    params = params_class(scale=None, orig_dtype=dtype, orig_shape=tuple(shape), places=places)
    return tensor_class(buffer, NAME, params)


def unwrap(tensor: Any) -> QuantWeight:
    """The weight that `wrap` put into a QuantizedTensor, as views of wherever it was moved since.

    Kept at the tensor: making the views takes longer than launching a small layer.
    """
    params, buffer = tensor._params, tensor._qdata
    known = getattr(tensor, "_slipstream_views", None)
    if known is None or known[0] is not buffer:
        weight = unpacked(buffer, params.places, tuple(params.orig_shape))
        known = tensor._slipstream_views = (buffer, weight)
    return known[1]


def is_quantised(value: Any) -> bool:
    """Whether a weight is one of ours."""
    return getattr(value, "_layout_cls", None) == NAME
