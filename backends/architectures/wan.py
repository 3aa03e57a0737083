"""Wan 2.1 and 2.2: text and image to video, 5B, VACE, camera, S2V, HuMo, Animate, SCAIL, Dancer."""

from .data import Architecture, Carry, Notes, Stack

BLOCKS = Stack(blocks="blocks", block_type="double", attention_calls=2)
# image-to-video cross attention makes two calls: text, and image with low_precision_attention=False
VARIABLE = Stack(blocks="blocks", block_type="double", attention_calls=None)
I2V_BLOCKS = Stack(blocks="blocks", block_type="double", attention_calls=3)
VACE_BLOCKS = Stack(
    blocks="vace_blocks",
    block_type="vace",
    carry=Carry(streams=("c",), args=("c",), returns=("c_skip", "c")),
    attention_calls=2,
)

ARCHITECTURES = (
    Architecture(
        class_name="WanModel",
        name="Wan",
        stacks=(VARIABLE,),
        notes=Notes(
            remarks=(
                "attention calls per block: 2, image-to-video 3",
                "e is [B, 1, 6, dim], or [B, frames, 6, dim] with a timestep per frame (5B, S2V);"
                " VACE and camera models make it [B, 6, dim]",
            )
        ),
    ),
    Architecture(
        class_name="VaceWanModel",
        name="Wan VACE",
        stacks=(BLOCKS,),
        side=(VACE_BLOCKS,),
        notes=Notes(
            adds_between=True,
            remarks=(
                "behind block i runs vace block vace_layers_mapping[i], once per context, with"
                " block i's ids; the host adds c_skip into block i's output, in place",
                "the argument x of a vace block is the stack's input, the same for all of them",
            ),
        ),
    ),
    Architecture(
        class_name="WanModel_S2V",
        name="Wan S2V",
        stacks=(BLOCKS,),
        side=(
            Stack(
                blocks="audio_injector.injector",
                block_type="audio",
                attention_calls=0,  # called without transformer_options
            ),
        ),
        notes=Notes(
            adds_between=True,
            adds_from_stream=True,
            remarks=("audio_injector writes into the output of its blocks, in place",),
        ),
    ),
    Architecture(
        class_name="HumoWanModel",
        name="Wan HuMo",
        stacks=(VARIABLE,),
        notes=Notes(remarks=("attention calls per block: 2, with audio 3",)),
    ),
    Architecture(
        class_name="AnimateWanModel",
        name="Wan Animate",
        stacks=(I2V_BLOCKS,),
        notes=Notes(
            adds_between=True,
            adds_from_stream=True,
            remarks=(
                "behind every fifth block the host adds face_adapter.fuser_blocks[i // 5], whose"
                " attention does not reach the override",
            ),
        ),
    ),
    Architecture(class_name="SCAILWanModel", name="Wan SCAIL", stacks=(I2V_BLOCKS,)),
    Architecture(
        class_name="WanDancerModel",
        name="Wan Dancer",
        stacks=(I2V_BLOCKS,),
        side=(Stack(blocks="music_injector.injector", block_type="music", attention_calls=0),),
        notes=Notes(
            adds_between=True,
            adds_from_stream=True,
            remarks=("music_injector writes into the output of its blocks, in place",),
        ),
    ),
    Architecture(
        class_name="WanAnimate2Model",
        name="Wan Animate 2",
        stacks=(),
        notes=Notes(
            remarks=(
                "the host calls forward_pose and forward_gen of its blocks, never forward: block"
                " hooks would not run, so there is no stack",
            )
        ),
    ),
    Architecture(
        class_name="CausalWanModel",
        name="Wan causal (autoregressive)",
        stacks=(VARIABLE,),
        notes=Notes(
            remarks=(
                'with transformer_options["ar_state"] (autoregressive sampler) the model runs no'
                " DIFFUSION_MODEL wrappers, passes no options, and every block has to fill its"
                " key-value cache; otherwise it is a WanModel",
            )
        ),
    ),
)
