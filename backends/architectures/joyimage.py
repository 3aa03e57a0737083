"""JoyImage."""

from .data import Architecture, Carry, Stack

ARCHITECTURES = (
    Architecture(
        class_name="JoyImageTransformer3DModel",
        name="JoyImage",
        stacks=(
            Stack(
                blocks="double_blocks",
                block_type="double",
                carry=Carry(
                    streams=("img", "txt"),
                    args=("hidden_states", "encoder_hidden_states"),
                    returns=("img", "txt"),
                ),
            ),
        ),
    ),
)
