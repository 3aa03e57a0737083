"""Flux.1 and Flux.2 (one class), and Chroma, which shares its blocks."""

from .data import JOIN_CAT, Architecture, Carry, Notes, Stack

DUAL = Carry(streams=("img", "txt"), args=("img", "txt"), returns=("img", "txt"))

STACKS = (
    Stack(blocks="double_blocks", block_type="double", carry=DUAL),
    Stack(blocks="single_blocks", block_type="single", joins=JOIN_CAT),
)

ARCHITECTURES = (
    Architecture(class_name="Flux", name="Flux", stacks=STACKS, notes=Notes(in_place=True)),
    Architecture(class_name="Chroma", name="Chroma", stacks=STACKS, notes=Notes(in_place=True)),
)
