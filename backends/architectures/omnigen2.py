"""OmniGen2, and Boogu, which puts dual-stream blocks in front of OmniGen2's."""

from .data import JOIN_CAT, Architecture, Carry, Notes, Stack

HIDDEN = Carry(args=("hidden_states",))
REFINERS = tuple(
    Stack(blocks=name, block_type=name, carry=HIDDEN)
    for name in ("context_refiner", "noise_refiner", "ref_image_refiner")
)
NOTES = Notes(
    diffusion_model_wrappers=False,
    block_ids=False,
    block_types=False,
    remarks=("the refiners run before the stacks; ref_image_refiner only with reference latents",),
)

ARCHITECTURES = (
    Architecture(
        class_name="OmniGen2Transformer2DModel",
        name="OmniGen2",
        stacks=(Stack(blocks="layers", block_type="single", carry=HIDDEN),),
        side=REFINERS,
        notes=NOTES,
    ),
    Architecture(
        class_name="BooguTransformer2DModel",
        name="Boogu",
        stacks=(
            Stack(
                blocks="double_stream_layers",
                block_type="double",
                carry=Carry(
                    streams=("img", "txt"),
                    args=("img_hidden_states", "instruct_hidden_states"),
                    returns=("img", "txt"),
                ),
                attention_calls=2,
            ),
            Stack(blocks="single_stream_layers", block_type="single", carry=HIDDEN, joins=JOIN_CAT),
        ),
        side=REFINERS,
        notes=NOTES,
    ),
)
