"""Qwen-Image, -Edit (-2509, -2511), -Layered and their distillations: separate q, k, v."""

from typing import Any

from .data import Block, Family, Shapes, Variant, layer, num_blocks, one, part

_QKV = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
_FUSED = ("attn.to_qkv", "attn.add_qkv_proj")

BLOCK = Block(
    source="transformer_blocks",
    target="transformer_blocks",
    layers=(
        *(
            layer(f"attn.{name}", part(fused, index, 3), one(f"attn.{name}"))
            for fused, names in zip(_FUSED, _QKV, strict=True)
            for index, name in enumerate(names)
        ),
        layer("attn.to_out.0", one("attn.to_out.0")),
        layer("attn.to_add_out", one("attn.to_add_out")),
        *(
            layer(f"{stream}_mlp.{name}", one(f"{stream}_mlp.{name}", unsigned=unsigned))
            for stream in ("img", "txt")
            for name, unsigned in (("net.0.proj", False), ("net.2", True))
        ),
        *(layer(f"{stream}_mod.1", one(f"{stream}_mod.1"), chunks=6) for stream in ("img", "txt")),
    ),
    copies=tuple(
        (name, name)
        for name in ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
    ),
)


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' QwenImageTransformer2DModel config."""
    hidden, in_channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": num_blocks(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    }


QWEN_IMAGE = Family(
    id="qwen-image",
    title="Qwen-Image",
    model_class="NunchakuQwenImageTransformer2DModel",
    dialect="nunchaku-2",
    markers=(("transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.txt_mlp.net.2"),),
    native=("transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.attn.to_q"),
    blocks=(BLOCK,),
    rest=(("", ""),),
    diffusers_config=diffusers_config,
    variants=(
        Variant(
            title="Qwen-Image-Edit-2511",
            tensor="__index_timestep_zero__",
            flags=("zero_cond_t",),
            is_marker=True,
            in_name="2511",
            advice=(
                "put the node Edit Model Reference Method (FluxKontextMultiReferenceLatentMethod) "
                "with index_timestep_zero behind the prompt"
            ),
        ),
        Variant(
            title="Qwen-Image-Layered",
            tensor="time_text_embed.addition_t_embedding.weight",
            flags=("use_additional_t_cond", "use_layer3d_rope"),
        ),
    ),
)
