"""Z-Image: one stream, SwiGLU feed-forward (signed), refiners that a file may leave in 16 bits."""

from typing import Any

from .data import Block, Family, Shapes, layer, num_blocks, one, part, rows

_LAYERS = (
    layer(
        "attention.qkv",
        one("attention.to_qkv"),
        rows("attention.to_q", "attention.to_k", "attention.to_v"),
    ),
    layer("attention.out", one("attention.to_out.0")),
    layer("feed_forward.w3", part("feed_forward.net.0.proj", 0, 2), one("feed_forward.w3")),
    layer("feed_forward.w1", part("feed_forward.net.0.proj", 1, 2), one("feed_forward.w1")),
    layer("feed_forward.w2", one("feed_forward.net.2"), one("feed_forward.w2")),
)
_COPIES = (
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
    *(
        (name, name)
        for name in (
            "attention_norm1",
            "attention_norm2",
            "ffn_norm1",
            "ffn_norm2",
            "adaLN_modulation.0",
        )
    ),
)
REFINERS = ("noise_refiner", "context_refiner")


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' ZImageTransformer2DModel config; what no shape tells is Z-Image's own value."""
    dim, cap_feat_dim = shapes["cap_embedder.1.weight"]
    head = shapes["layers.0.attention.q_norm.weight"][0]
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": shapes["x_embedder.weight"][1] // 4,
        "dim": dim,
        "n_layers": num_blocks(shapes, "layers"),
        "n_refiner_layers": num_blocks(shapes, "noise_refiner"),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "cap_feat_dim": cap_feat_dim,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }


Z_IMAGE = Family(
    id="z-image",
    title="Z-Image",
    model_class="NunchakuZImageTransformer2DModel",
    dialect="nunchaku-2",
    markers=(
        ("layers.0.attention.to_qkv", "layers.0.feed_forward.net.2"),
        ("layers.0.attention.to_q", "layers.0.feed_forward.w2"),
    ),
    native=("layers.0.attention.qkv", "layers.0.feed_forward.w2", "cap_pad_token"),
    blocks=tuple(
        Block(source=name, target=name, layers=_LAYERS, copies=_COPIES)
        for name in ("layers", *REFINERS)
    ),
    rest=(
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        ("cap_embedder", "cap_embedder"),
        ("t_embedder", "t_embedder"),
        ("x_pad_token", "x_pad_token"),
        ("cap_pad_token", "cap_pad_token"),
    ),
    diffusers_config=diffusers_config,
    quantization={"skip_refiners": False},
)
