"""AuraFlow."""

from .data import JOIN_CAT, Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="MMDiT",
        module="aura.mmdit",  # SD3's base class has the same name
        name="AuraFlow",
        stacks=(
            Stack(
                blocks="double_layers",
                block_type="double",
                carry=Carry(streams=("txt", "img"), args=("c", "x"), returns=("txt", "img")),
            ),
            Stack(
                blocks="single_layers",
                block_type="single",
                carry=Carry(args=("cx",)),
                joins=JOIN_CAT,
            ),
        ),
        notes=Notes(block_ids=False, block_types=False),
    ),
)
