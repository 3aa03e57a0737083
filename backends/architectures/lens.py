"""Lens."""

from .data import Architecture, Carry, Stack

ARCHITECTURES = (
    Architecture(
        class_name="LensTransformer2DModel",
        name="Lens",
        stacks=(
            Stack(
                blocks="transformer_blocks",
                block_type="double",
                carry=Carry(
                    streams=("img", "txt"),
                    args=("hidden_states", "encoder_hidden_states"),
                    returns=("txt", "img"),
                ),
            ),
        ),
    ),
)
