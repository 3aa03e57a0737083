"""LTX-Video, and LTX-2 with audio (LTXAV)."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="LTXVModel",
        name="LTX-Video",
        stacks=(Stack(blocks="transformer_blocks", block_type="double", attention_calls=2),),
        notes=Notes(block_ids=False, block_types=False, in_place=True),
    ),
    Architecture(
        class_name="LTXAVModel",
        name="LTX-2",
        stacks=(
            Stack(
                blocks="transformer_blocks",
                block_type="double",
                carry=Carry(
                    streams=("video", "audio"),
                    args=("x",),
                    returns=("video", "audio"),
                    packed=True,
                ),
                attention_calls=6,
            ),
        ),
        side=tuple(
            Stack(
                blocks=f"{name}_embeddings_connector.transformer_1d_blocks",
                block_type=f"{name}_connector",
                carry=Carry(args=("hidden_states",)),
                attention_calls=0,  # run once, before sampling, without transformer_options
            )
            for name in ("video", "audio")
        ),
        notes=Notes(
            block_ids=False,
            block_types=False,
            prefetches=True,
            in_place=True,
            remarks=(
                "the tuple (video, audio) goes in by position; 2 attention calls without audio",
                "the connectors run in extra_conds, for prompts that did not go through them yet",
            ),
        ),
    ),
)
