"""A MODEL's weight patches on the wire: LoRA, DoRA, LoKr, LoHa, GLoRA, OFT, diff and set.

A patch is (strength, value, model strength, offset, function); values are ComfyUI's weight
adapters or tuples of tensors. A patch with a function (model merges carry a lambda) cannot travel.
"""

import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .wire import decode, encode

Parts = Callable[[Any], tuple[str, list[str], Any] | None]  # adapter -> class, keys, weights
Make = Callable[[str, Sequence[str], Any], Any]


def encode_patches(
    patches: dict[str, list[Any]], parts: Parts
) -> tuple[Any, list[torch.Tensor], str]:
    """Encoded patches, their tensors on the CPU, and the SHA-256 of both.

    Raises Unsupported for a patch that cannot travel.
    """
    encoded, tensors = walk_patches(patches, parts)
    tensors = [t.detach().cpu().contiguous() for t in tensors]
    return encoded, tensors, digest(encoded, tensors)


def walk_patches(patches: dict[str, list[Any]], parts: Parts) -> tuple[Any, list[torch.Tensor]]:
    """Encoded patches and their tensors, untouched. Raises Unsupported."""

    def adapter(value: Any, one: Callable[[Any, str], Any]) -> Any:
        found = parts(value)
        if found is None:
            return None
        name, keys, weights = found
        return ["adapter", name, keys, one(weights, "weights")]

    tensors: list[torch.Tensor] = []
    return encode(patches, tensors, "patches", other=adapter), tensors


def decode_patches(
    encoded: Any, tensors: Sequence[torch.Tensor], make: Make
) -> dict[str, list[Any]]:
    """The patches. Raises ValueError for anything that is not one."""

    def adapter(found: list[Any], one: Callable[[Any], Any]) -> Any:
        kind, *rest = found
        if kind != "adapter":
            raise ValueError(f"unknown kind {kind!r} in patches")
        name, keys, weights = rest
        return make(name, keys, one(weights))

    return decode(encoded, tensors, other=adapter)


def digest(encoded: Any, tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 of encoded patches and the bytes of their tensors (contiguous, on the CPU)."""
    found = hashlib.sha256(json.dumps(encoded).encode())
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            found.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return found.hexdigest()
