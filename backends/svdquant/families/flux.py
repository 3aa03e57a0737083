"""FLUX.1: dev, schnell, fill, canny, depth, kontext, krea and their finetunes."""

from typing import Any

from .data import Block, Family, Piece, Shapes, columns, layer, num_blocks, one, rows


def _stream(stream: str, qkv: str, separate: tuple[str, ...], out: str, ff: str, mod: str) -> Any:
    return (
        layer(f"{stream}_attn.qkv", one(qkv), rows(*separate)),
        layer(f"{stream}_attn.proj", one(out)),
        layer(f"{stream}_mlp.0", one(f"{ff}.net.0.proj")),
        layer(f"{stream}_mlp.2", one(f"{ff}.net.2", unsigned=True)),
        layer(f"{stream}_mod.lin", one(f"{mod}.linear"), chunks=6),
    )


DOUBLE = Block(
    source="transformer_blocks",
    target="double_blocks",
    layers=(
        *_stream(
            "img",
            "attn.to_qkv",
            ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.to_out.0",
            "ff",
            "norm1",
        ),
        *_stream(
            "txt",
            "attn.add_qkv_proj",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.to_add_out",
            "ff_context",
            "norm1_context",
        ),
    ),
    copies=(
        ("attn.norm_q", "img_attn.norm.query_norm"),
        ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm"),
    ),
)

SINGLE = Block(
    source="single_transformer_blocks",
    target="single_blocks",
    layers=(
        layer(
            "linear1",
            rows("attn.to_qkv", "mlp_fc1"),
            rows("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            sizes=(3, -1),
        ),
        layer(
            "linear2",
            columns(Piece(name="attn.to_out"), Piece(name="mlp_fc2", unsigned=True)),
            one("proj_out"),
            sizes=(1, -1),
        ),
        layer("modulation.lin", one("norm.linear"), chunks=3),
    ),
    copies=(
        ("attn.norm_q", "norm.query_norm"),
        ("attn.norm_k", "norm.key_norm"),
    ),
)

_OLD_DOUBLE = (
    ("qkv_proj", "attn.to_qkv"),
    ("qkv_proj_context", "attn.add_qkv_proj"),
    ("out_proj", "attn.to_out.0"),
    ("out_proj_context", "attn.to_add_out"),
    ("mlp_fc1", "ff.net.0.proj"),
    ("mlp_fc2", "ff.net.2"),
    ("mlp_context_fc1", "ff_context.net.0.proj"),
    ("mlp_context_fc2", "ff_context.net.2"),
    ("norm_q", "attn.norm_q"),
    ("norm_k", "attn.norm_k"),
    ("norm_added_q", "attn.norm_added_q"),
    ("norm_added_k", "attn.norm_added_k"),
)
_OLD_SINGLE = (
    ("qkv_proj", "attn.to_qkv"),
    ("out_proj", "attn.to_out"),
    ("norm_q", "attn.norm_q"),
    ("norm_k", "attn.norm_k"),
)

_EMBEDDERS = tuple(
    (f"time_text_embed.{theirs}.linear_{i}", f"{ours}.{end}_layer")
    for theirs, ours in (
        ("timestep_embedder", "time_in"),
        ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    )
    for i, end in ((1, "in"), (2, "out"))
)


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' FluxTransformer2DModel config."""
    hidden, in_channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.weight"][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": num_blocks(shapes, "double_blocks"),
        "num_single_layers": num_blocks(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, 56, 56],
    }


def comfy_config(shapes: Shapes) -> dict[str, Any]:
    """ComfyUI's Flux settings, which ComfyUI-nunchaku reads instead of detecting the model."""
    known = diffusers_config(shapes)
    hidden = shapes["img_in.weight"][0]
    model = {
        "image_model": "flux",
        "in_channels": known["in_channels"] // 4,
        "out_channels": known["out_channels"] // 4,
        "patch_size": 2,
        "vec_in_dim": known["pooled_projection_dim"],
        "context_in_dim": known["joint_attention_dim"],
        "hidden_size": hidden,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        "num_heads": known["num_attention_heads"],
        "depth": known["num_layers"],
        "depth_single_blocks": known["num_single_layers"],
        "axes_dim": known["axes_dims_rope"],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": known["guidance_embeds"],
        "disable_unet_model_creation": True,
    }
    name = "Flux" if model["guidance_embed"] else "FluxSchnell"
    return {"model_class": name, "model_config": model}


FLUX = Family(
    id="flux",
    title="FLUX.1",
    model_class="NunchakuFluxTransformer2dModel",
    dialect="nunchaku-1",
    markers=(
        ("transformer_blocks.0.ff_context.net.2", "single_transformer_blocks.0.mlp_fc2"),
        ("transformer_blocks.0.ff_context.net.2", "single_transformer_blocks.0.proj_out"),
    ),
    native=("double_blocks.0.img_mod.lin", "single_blocks.0.linear1", "txt_in"),
    blocks=(DOUBLE, SINGLE),
    rest=(
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        *_EMBEDDERS,
    ),
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    aliases=(
        *(("transformer_blocks", old, new) for old, new in _OLD_DOUBLE),
        *(("single_transformer_blocks", old, new) for old, new in _OLD_SINGLE),
    ),
    diffusers_config=diffusers_config,
    comfy_config=comfy_config,
)
