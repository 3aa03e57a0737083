"""The model families whose SVDQuant files can be read and written, as data."""

from .data import Block, Family, Grid, Layer, Piece, Variant
from .flux import FLUX
from .qwen_image import QWEN_IMAGE
from .sdxl import SDXL
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, QWEN_IMAGE, Z_IMAGE, SDXL)
SUPPORTED = ", ".join(family.title for family in FAMILIES)

__all__ = ["FAMILIES", "SUPPORTED", "Block", "Family", "Grid", "Layer", "Piece", "Variant"]
