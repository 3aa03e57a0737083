"""Values on the wire: JSON with raw tensors beside it. Nothing is ever pickled or unpickled.

Scalars stand for themselves, everything else is a list whose first element names its kind;
tensors become references into a list that travels beside the JSON. An object of any other type
is refused by its path.
"""

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.errors import SlipstreamError


class Unsupported(SlipstreamError, TypeError):  # noqa: N818 - not an error: the call stays on one device
    """A value that cannot travel, named by its path."""


@dataclass(frozen=True)
class Meta:
    """A tensor as announced: shape, dtype, and whether it lives on the device or on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: torch.Tensor) -> "Meta":
        return Meta(tuple(tensor.shape), tensor.dtype, tensor.device.type != "cpu")

    def to_json(self) -> list[Any]:
        return [list(self.shape), _dtype_name(self.dtype), self.on_device]

    @staticmethod
    def from_json(found: list[Any]) -> "Meta":
        shape, dtype, on_device = found
        return Meta(tuple(int(n) for n in shape), _dtype(dtype), bool(on_device))


def encode(
    value: Any,
    tensors: list[torch.Tensor],
    path: str = "",
    *,
    other: Callable[[Any, Callable[[Any, str], Any]], Any] | None = None,
) -> Any:
    """`value` as JSON; its tensors are appended to `tensors`.

    other(value, encode) may encode a type of its own as a list, or return None.
    """

    def one(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
            return value
        if torch.is_tensor(value):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_sparse:
                raise Unsupported(f"{path} is a {type(value).__name__}")
            tensors.append(value)
            return ["tensor", len(tensors) - 1]
        if type(value) in (list, tuple):
            items = [one(v, f"{path}[{i}]") for i, v in enumerate(value)]
            return ["list" if type(value) is list else "tuple", *items]
        if isinstance(value, dict):
            return ["dict", *([one(k, f"{path} key"), one(v, f"{path}.{k}")]
                              for k, v in value.items())]  # fmt: skip
        found = _scalar(value)
        if found is None and other is not None:
            found = other(value, lambda v, name: one(v, f"{path}.{name}"))
        if found is None:
            raise Unsupported(f"{path or 'a value'} is a {_type_name(value)}")
        return found

    return one(value, path)


def encode_plain(value: Any, path: str) -> Any:
    """`value`, which must hold no tensor, as JSON. Raises Unsupported."""
    tensors: list[torch.Tensor] = []
    encoded = encode(value, tensors, path)
    if tensors:
        raise Unsupported(f"{path} is or holds a tensor")
    return encoded


def decode(
    value: Any,
    tensors: Sequence[torch.Tensor],
    *,
    device: torch.device | None = None,
    other: Callable[[list[Any], Callable[[Any], Any]], Any] | None = None,
) -> Any:
    """The value that `encode` was given. device: what "here" stands for.

    other(found, decode) reads the lists of `encode`'s other. Raises ValueError on anything else.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind == "tensor":
            return tensors[rest[0]]
        if kind in ("list", "set"):
            return [one(v) for v in rest] if kind == "list" else {one(v) for v in rest}
        if kind == "tuple":
            return tuple(one(v) for v in rest)
        if kind == "dict":
            return {one(k): one(v) for k, v in rest}
        if kind == "device":
            return device if rest[0] == "here" and device is not None else torch.device(rest[0])
        if kind in _READ:
            return _READ[kind](*rest)
        if other is None:
            raise ValueError(f"unknown kind {kind!r} on the wire")
        return other(value, one)

    return one(value)


_READ: dict[str, Callable[..., Any]] = {
    "dtype": lambda name: _dtype(name),
    "size": lambda *lengths: torch.Size(lengths),
    "slice": lambda start, stop, step: slice(start, stop, step),
    "uuid": lambda text: uuid.UUID(text),
}


def _scalar(value: Any) -> list[Any] | None:
    if isinstance(value, torch.dtype):
        return ["dtype", _dtype_name(value)]
    if isinstance(value, torch.device):
        return ["device", "cpu" if value.type == "cpu" else "here"]
    if isinstance(value, torch.Size):
        return ["size", *value]
    if isinstance(value, slice):
        return ["slice", value.start, value.stop, value.step]
    if isinstance(value, uuid.UUID):
        return ["uuid", str(value)]
    if type(value) in (set, frozenset) and all(isinstance(v, (str, int)) for v in value):
        return ["set", *sorted(value)]
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r} on the wire")
    return found


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
