"""Cosmos-Predict2 (image and video), and Anima, which inherits its forward."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="MiniTrainDIT",
        name="Cosmos-Predict2",
        stacks=(
            Stack(
                blocks="blocks",
                block_type="double",
                carry=Carry(args=("x_B_T_H_W_D",)),
                attention_calls=2,
            ),
        ),
        notes=Notes(
            block_types=False,
            remarks=(
                "the stream is 5-D, [B, T, H, W, D]; fp16 models keep it in fp32",
                "there are no patches_replace hooks",
            ),
        ),
    ),
)
