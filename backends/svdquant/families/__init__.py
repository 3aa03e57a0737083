"""The model families whose SVDQuant files can be read and written, as data.

CORE stands for every other model whose file has ComfyUI's own names: nothing is renamed, and what
the model is, ComfyUI's detection says.
"""

from .chroma import CHROMA
from .data import Block, Family, Grid, Layer, Piece, Variant
from .flux import FLUX
from .flux2 import FLUX2
from .minimax_h3 import MINIMAX_H3
from .qwen_image import QWEN_IMAGE
from .sdxl import SDXL
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, QWEN_IMAGE, Z_IMAGE, SDXL)
READ_ONLY: tuple[Family, ...] = (FLUX2, CHROMA, MINIMAX_H3)
SUPPORTED = ", ".join(family.title for family in FAMILIES)
READABLE = ", ".join(family.title for family in (*FAMILIES, *READ_ONLY))
CORE = Family(
    id="core",
    title="model",
    model_class="",
    dialect="comfy-kitchen",
    markers=(),
    native=(),
    blocks=(),
    rest=(),
)

__all__ = [
    "CORE",
    "FAMILIES",
    "READABLE",
    "READ_ONLY",
    "SUPPORTED",
    "Block",
    "Family",
    "Grid",
    "Layer",
    "Piece",
    "Variant",
]
