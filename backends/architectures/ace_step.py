"""ACE-Step 1 and 1.5 (music)."""

from .data import Architecture, Carry, Notes, Stack

HIDDEN = Carry(args=("hidden_states",))

ARCHITECTURES = (
    Architecture(
        class_name="ACEStepTransformer2DModel",
        name="ACE-Step",
        stacks=(Stack(blocks="transformer_blocks", block_type="double", carry=HIDDEN),),
        notes=Notes(
            block_ids=False,
            block_types=False,
            remarks=(
                "self attention is linear, without the override; cross attention is the one call",
                "the lyric encoder runs in every call, by attention of its own",
            ),
        ),
    ),
    Architecture(
        class_name="AceStepConditionGenerationModel",
        name="ACE-Step 1.5",
        stacks=(
            Stack(blocks="decoder.layers", block_type="double", carry=HIDDEN, attention_calls=0),
        ),
        side=tuple(
            Stack(blocks=f"{owner}.layers", block_type=name, carry=HIDDEN, attention_calls=0)
            for owner, name in (
                ("encoder.lyric_encoder", "lyric_encoder"),
                ("encoder.timbre_encoder", "timbre_encoder"),
                ("tokenizer.attention_pooler", "tokenizer"),
                ("detokenizer", "detokenizer"),
            )
        ),
        notes=Notes(
            diffusion_model_wrappers=False,
            reaches_override=False,
            block_ids=False,
            block_types=False,
            remarks=(
                "the encoders, and what makes hints of the reference audio, run in every call",
                "the tokenizer runs only without audio codes",
                "every second block attends within a window of 128 tokens, by a mask of its own",
            ),
        ),
    ),
)
