"""Lumina Image 2 and Z-Image (NextDiT), Z-Image in pixel space included."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="NextDiT",
        name="Lumina 2 / Z-Image",
        stacks=(Stack(blocks="layers", block_type="double"),),
        side=(
            Stack(blocks="context_refiner", block_type="context_refiner"),
            Stack(blocks="siglip_refiner", block_type="siglip_refiner"),
            Stack(blocks="noise_refiner", block_type="noise_refiner"),
        ),
        notes=Notes(
            remarks=(
                "the refiners run before layers, on text, references and image apart, and have no"
                " block id; layers then get cat((txt, refs, img), dim=1)",
                "there are no patches_replace hooks",
            )
        ),
    ),
)
