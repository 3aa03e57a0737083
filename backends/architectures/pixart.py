"""PixArt Alpha and Sigma."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="PixArtMS",
        name="PixArt",
        stacks=(Stack(blocks="blocks", block_type="single", attention_calls=0),),
        notes=Notes(
            diffusion_model_wrappers=False,
            reaches_override=False,
            block_ids=False,
            block_types=False,
        ),
    ),
)
