"""CogVideoX."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="CogVideoXTransformer3DModel",
        name="CogVideoX",
        stacks=(
            Stack(
                blocks="blocks",
                block_type="double",
                carry=Carry(
                    streams=("img", "txt"),
                    args=("hidden_states", "encoder_hidden_states"),
                    returns=("img", "txt"),
                ),
            ),
        ),
        notes=Notes(
            block_ids=False,
            block_types=False,
            remarks=("there are no patches_replace hooks",),
        ),
    ),
)
