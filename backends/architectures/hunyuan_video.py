"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1: one class with Flux's blocks."""

from . import flux
from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="HunyuanVideo",
        name="HunyuanVideo",
        stacks=flux.STACKS,
        side=(
            Stack(
                blocks="txt_in.individual_token_refiner.blocks",
                block_type="txt_refiner",
            ),
        ),
        notes=Notes(
            in_place=True,
            remarks=(
                "the text refiner runs before the stacks and has no block id",
                "a text mask becomes an additive [1, 1, tokens] mask for all blocks",
            ),
        ),
    ),
)
