"""Krea 2."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="SingleStreamDiT",
        name="Krea 2",
        stacks=(Stack(blocks="blocks", block_type="single"),),
        side=(
            Stack(blocks="txtfusion.layerwise_blocks", block_type="txt_layers"),
            Stack(blocks="txtfusion.refiner_blocks", block_type="txt_refiner"),
        ),
        notes=Notes(
            remarks=(
                "blocks get cat((txt, img), dim=1) and the mask (None) by position",
                "there are no patches_replace hooks",
            )
        ),
    ),
)
