"""The U-Net of SD1.5, SD2, SDXL, SVD and their relatives.

ComfyUI never calls a level (TimestepEmbedSequential): forward_timestep_embed walks its children
and calls each with what its class takes, so a forward override on the level does nothing, and one
on every child (ResBlock, SpatialTransformer, Downsample, Upsample, Conv2d) does. The stream is the
first positional argument of each child.
"""

from .data import JOIN_SKIP, Architecture, Carry, Notes, Stack

CHILD = Carry(args=("",))


def _levels(blocks: str, block_type: str, joins: str = "") -> Stack:
    return Stack(
        blocks=blocks,
        block_type=block_type,
        carry=CHILD,
        attention_calls=None,
        joins=joins,
        children=True,
    )


ARCHITECTURES = (
    Architecture(
        class_name="UNetModel",
        name="Stable Diffusion U-Net",
        stacks=(
            _levels("input_blocks", "input"),
            _levels("middle_block", "middle"),
            _levels("output_blocks", "output", joins=JOIN_SKIP),
        ),
        notes=Notes(
            unet=True,
            block_types=False,
            remarks=(
                'transformer_options["block"] is (block_type, index of the level);'
                ' ["block_index"] counts transformer blocks within one SpatialTransformer',
                "children are called as ResBlock(x, emb), SpatialTransformer(x, context,"
                " transformer_options), Upsample(x, output_shape=...), any other (x)",
                "the outputs of all input levels stay alive as skips; ControlNet, FreeU and"
                " input_block_patch write into them or replace them",
                "a cache that keeps the input of output level k (DeepCache) may skip input levels"
                " behind the mirrored one, the middle, and output levels before k; skipped children"
                " must still return tensors of the recorded shapes, because the host pops one skip"
                " per output level",
                "middle_block is None in some checkpoints",
            ),
        ),
    ),
)
