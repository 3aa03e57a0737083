"""MiniMax-H3 (video and audio)."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="MiniMaxH3Model",
        name="MiniMax-H3",
        stacks=(Stack(blocks="blocks", block_type="double"),),
        side=(
            Stack(
                blocks="token_refiner.blocks",
                block_type="txt_refiner",
                attention_calls=0,  # runs once, before sampling, without transformer_options
            ),
        ),
        notes=Notes(
            block_ids=False,
            block_types=False,
            prefetches=True,
            in_place=True,
            remarks=(
                "the stream is packed, [tokens, hidden] without a batch dimension, batch size 1",
            ),
        ),
    ),
)
