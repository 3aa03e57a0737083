"""HiDream-O1 (pixels and text in one language model)."""

from .data import Architecture, Carry, Notes, Stack

ARCHITECTURES = (
    Architecture(
        class_name="HiDreamO1Transformer",
        name="HiDream-O1",
        stacks=(
            Stack(
                blocks="language_model.layers",
                block_type="double",
                carry=Carry(returns=("x", "kv"), ignored=("kv",)),
                bypasses=1,  # the causal prefix
            ),
        ),
        notes=Notes(
            in_place=True,
            options_through="optimized_attention",
            unbatched=("position_ids", "ref_image_grid_thw", "ref_pixel_values"),
            whole_sequence={"patches_replace": {"dit": {"slipstream": None}}},
            remarks=(
                "keys and values of the prompt are kept on the network from the first call on, and"
                " later calls run the rest of the sequence alone, unless a block may be replaced",
                "positions and reference pictures of the first row hold for all rows",
                "visual encodes reference pictures outside these blocks, in every call",
                "only the call that keeps them reads what a block returns beside x",
            ),
        ),
    ),
)
