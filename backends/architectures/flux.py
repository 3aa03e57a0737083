"""Flux.1 and Flux.2 (one class), and Chroma, which shares their blocks."""

from .data import JOIN_CAT, Architecture, Carry, Notes, Stack

DUAL = Carry(streams=("img", "txt"), args=("img", "txt"), returns=("img", "txt"))

STACKS = (
    Stack(blocks="double_blocks", block_type="double", carry=DUAL),
    Stack(blocks="single_blocks", block_type="single", joins=JOIN_CAT),
)
NOTES = Notes(
    in_place=True,
    remarks=(
        "double blocks get img and txt by keyword, single blocks get x by position",
        "in fp16 the host runs nan_to_num between the two stacks",
    ),
)

ARCHITECTURES = (
    Architecture(class_name="Flux", name="Flux", stacks=STACKS, notes=NOTES),
    Architecture(class_name="Chroma", name="Chroma", stacks=STACKS, notes=NOTES),
    Architecture(
        class_name="ChromaRadiance",
        name="Chroma Radiance",
        stacks=STACKS,
        notes=Notes(
            in_place=True,
            remarks=("nerf_blocks run behind the stacks, on pixels, without attention",),
        ),
    ),
)
