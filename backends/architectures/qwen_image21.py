"""Qwen-Image 2.1 (ComfyUI 0.37 and later)."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="QwenImage21Transformer2DModel",
        name="Qwen-Image 2.1",
        stacks=(Stack(blocks="transformer_blocks", block_type="single", attention_calls=None),),
        notes=Notes(
            prefetches=True,
            in_place=True,
            whole_sequence={"qwen_image21_cache": {"device": "off"}},
            remarks=(
                "text and reference images come first and do not see the picture: core keeps their"
                " keys and values, in a call that runs every block twice, and runs the picture"
                " alone in later ones",
                "attention calls per block: one per text part and image, the text's with a mask",
                "Fun-ControlNet adds after each block",
            ),
        ),
    ),
)
