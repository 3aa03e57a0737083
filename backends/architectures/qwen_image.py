"""Qwen-Image (with Edit and Layered), and Mage-Flow, which shares its blocks."""

from .data import Architecture, Carry, Stack

# the block returns text first
STACKS = (
    Stack(
        blocks="transformer_blocks",
        block_type="double",
        carry=Carry(
            streams=("img", "txt"),
            args=("hidden_states", "encoder_hidden_states"),
            returns=("txt", "img"),
        ),
    ),
)

ARCHITECTURES = (
    Architecture(class_name="QwenImageTransformer2DModel", name="Qwen-Image", stacks=STACKS),
    Architecture(class_name="MageFlowTransformer2DModel", name="Mage-Flow", stacks=STACKS),
)
