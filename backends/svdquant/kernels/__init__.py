"""Implementations of one quantised segment, in the order of `auto` before it has measured."""

from .base import Kernel, LayerRequest, LowRank, ShareKey
from .dequant import Dequant
from .kitchen import Kitchen
from .nunchaku import Nunchaku
from .reference import Reference

KERNELS: tuple[Kernel, ...] = (Kitchen(), Nunchaku(), Dequant(), Reference())

__all__ = [
    "KERNELS",
    "Dequant",
    "Kernel",
    "Kitchen",
    "LayerRequest",
    "LowRank",
    "Nunchaku",
    "Reference",
    "ShareKey",
]
