"""Cosmos 1 (Cosmos-Predict2 is another class)."""

from .data import Architecture, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="GeneralDIT",
        name="Cosmos 1",
        stacks=(Stack(blocks="blocks", block_type="double", attention_calls=2),),
        notes=Notes(
            block_ids=False,
            block_types=False,
            adds_between=True,
            remarks=(
                "the stream is 5-D, [T, H, W, B, D]: the batch is dim 3",
                "the host adds learned positions to the stream in front of every block, in place",
                "the blocks are a ModuleDict",
            ),
        ),
    ),
)
