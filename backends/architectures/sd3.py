"""Stable Diffusion 3 and 3.5."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="OpenAISignatureMMDITWrapper",
        name="Stable Diffusion 3",
        stacks=(
            Stack(
                blocks="joint_blocks",
                block_type="double",
                carry=Carry(
                    streams=("txt", "img"),
                    args=("context", "x"),  # forward(*args): text, then image
                    returns=("txt", "img"),
                    dropped=("txt",),
                ),
                attention_calls=None,
            ),
        ),
        notes=Notes(
            diffusion_model_wrappers=False,
            block_ids=False,
            block_types=False,
            remarks=(
                "attention calls per block: 1, 3.5 medium makes 2 in x_block_self_attn_layers",
                "ControlNet adds into the block's output, in place",
            ),
        ),
    ),
)
