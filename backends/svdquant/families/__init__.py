"""The model families whose SVDQuant files can be read and written, as data.

CORE stands for every other model whose file has ComfyUI's own names: nothing is renamed, and what
the model is, ComfyUI's detection says.
"""

from .data import Block, Family, Grid, Layer, Piece
from .flux import FLUX
from .qwen_image import QWEN_IMAGE
from .sdxl import SDXL
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, QWEN_IMAGE, Z_IMAGE, SDXL)
SUPPORTED = ", ".join(family.title for family in FAMILIES)
CORE = Family(
    id="core",
    title="model",
    model_class="",
    dialect="comfy-kitchen",
    markers=(),
    native=(),
    blocks=(),
    rest=(),
    diffusers_config=lambda shapes: {},
)

__all__ = ["CORE", "FAMILIES", "SUPPORTED", "Block", "Family", "Grid", "Layer", "Piece"]
