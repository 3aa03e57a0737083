"""HiDream-I1."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="HiDreamImageTransformer2DModel",
        name="HiDream-I1",
        stacks=(
            Stack(
                blocks="double_stream_blocks",
                block_type="double",
                carry=Carry(
                    streams=("img", "txt"),
                    args=("image_tokens", "text_tokens"),
                    returns=("img", "txt"),
                    tails=("txt",),
                ),
            ),
            Stack(
                blocks="single_stream_blocks",
                block_type="single",
                carry=Carry(args=("image_tokens",), tails=("x",)),
                joins="img,txt",
            ),
        ),
        notes=Notes(
            block_ids=False,
            block_types=False,
            remarks=(
                "each block gets the text of its own Llama layer appended to the text (single"
                " blocks: to the whole), and the host cuts it off behind the block",
                "single blocks still get text_tokens=None",
            ),
        ),
    ),
)
