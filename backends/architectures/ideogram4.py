"""Ideogram 4."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="Ideogram4Transformer2DModel",
        name="Ideogram 4",
        stacks=(Stack(blocks="layers", block_type="single"),),
        notes=Notes(
            block_ids=False,
            block_types=False,
            remarks=("without a prompt the sequence is the image alone",),
        ),
    ),
)
