"""ERNIE-Image."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="ErnieImageModel",
        name="ERNIE-Image",
        stacks=(Stack(blocks="layers", block_type="single", attention_calls=0),),
        notes=Notes(
            diffusion_model_wrappers=False,
            reaches_override=False,
            block_ids=False,
            block_types=False,
            remarks=("blocks get cat((img, txt), dim=1)",),
        ),
    ),
)
