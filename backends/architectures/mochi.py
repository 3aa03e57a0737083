"""Mochi."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="AsymmDiTJoint",
        name="Mochi",
        stacks=(
            Stack(
                blocks="blocks",
                block_type="double",
                carry=Carry(streams=("img", "txt"), args=("x", "y"), returns=("img", "txt")),
            ),
        ),
        notes=Notes(
            diffusion_model_wrappers=False,
            block_ids=False,
            block_types=False,
            remarks=(
                "only the first crop_y text tokens take part in attention, the padding behind them"
                " passes by",
                "the last block hands the text on as it is",
            ),
        ),
    ),
)
