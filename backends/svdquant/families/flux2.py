"""FLUX.2 (dev, klein): diffusers' names, separate or fused; no block has modulation of its own.

Read only. Sources: diffusers, scripts/convert_flux2_to_diffusers.py (names, the swapped halves of
the last modulation) for Nunchaku Lite; the community files of klein have Nunchaku's names with the
two fused layers of a single block apart. The feed-forward is SwiGLU: no layer is unsigned.
"""

from .data import Block, Family, Piece, columns, layer, one, rows


def _stream(stream: str, qkv: tuple[str, ...], parts: tuple[str, ...], out: str, ff: str) -> tuple:
    return (
        layer(f"{stream}_attn.qkv", *(one(name) for name in qkv), rows(*parts)),
        layer(f"{stream}_attn.proj", one(out)),
        layer(f"{stream}_mlp.0", one(f"{ff}.linear_in")),
        layer(f"{stream}_mlp.2", one(f"{ff}.linear_out")),
    )


DOUBLE = Block(
    source="transformer_blocks",
    target="double_blocks",
    layers=(
        *_stream(
            "img",
            ("attn.to_qkv",),
            ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.to_out.0",
            "ff",
        ),
        *_stream(
            "txt",
            ("attn.to_added_qkv", "attn.add_qkv_proj"),
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.to_add_out",
            "ff_context",
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
        layer("linear1", one("attn.to_qkv_mlp_proj"), rows("attn.qkv_proj", "attn.mlp_fc1")),
        layer(
            "linear2",
            one("attn.to_out"),
            columns(Piece(name="attn.out_proj"), Piece(name="attn.mlp_fc2")),
        ),
    ),
    copies=(("attn.norm_q", "norm.query_norm"), ("attn.norm_k", "norm.key_norm")),
)

_OLD_DOUBLE = (
    ("qkv_proj", "attn.to_qkv"),
    ("qkv_proj_context", "attn.to_added_qkv"),
    ("out_proj", "attn.to_out.0"),
    ("out_proj_context", "attn.to_add_out"),
    ("mlp_fc1", "ff.linear_in"),
    ("mlp_fc2", "ff.linear_out"),
    ("mlp_context_fc1", "ff_context.linear_in"),
    ("mlp_context_fc2", "ff_context.linear_out"),
    *((name, f"attn.{name}") for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
)
_OLD_SINGLE = tuple(
    (name, f"attn.{name}")
    for name in ("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2", "norm_q", "norm_k")
)
_MODULATION = (
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)

FLUX2 = Family(
    id="flux2",
    title="FLUX.2",
    model_class="NunchakuFlux2Transformer2DModel",
    dialect="nunchaku-2",
    markers=(("transformer_blocks.0.ff_context.linear_out", "single_stream_modulation.linear"),),
    native=(),
    blocks=(DOUBLE, SINGLE),
    rest=(
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        *((f"{name}.linear", f"{name}.lin") for name in _MODULATION),
        *(
            (f"time_guidance_embed.{theirs}.linear_{i}", f"{ours}.{end}_layer")
            for theirs, ours in (
                ("timestep_embedder", "time_in"),
                ("guidance_embedder", "guidance_in"),
            )
            for i, end in ((1, "in"), (2, "out"))
        ),
    ),
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    aliases=(
        *(("transformer_blocks", old, new) for old, new in _OLD_DOUBLE),
        *(("single_transformer_blocks", old, new) for old, new in _OLD_SINGLE),
    ),
)
