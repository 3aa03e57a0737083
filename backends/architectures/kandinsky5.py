"""Kandinsky 5, video and image."""

from .data import Architecture, Carry, Stack

ARCHITECTURES = (
    Architecture(
        class_name="Kandinsky5",
        name="Kandinsky 5",
        stacks=(
            Stack(
                blocks="visual_transformer_blocks",
                block_type="double",
                carry=Carry(args=("visual_embed",)),
                attention_calls=2,
            ),
        ),
        side=(Stack(blocks="text_transformer_blocks", block_type="text"),),
    ),
)
