"""MiniMax-H3: diffusers' names (Nunchaku Lite). Read only.

Source: diffusers, scripts/convert_minimax_h3_to_diffusers.py. Its feed-forward has the value
above the gate, ComfyUI's the gate above the value; the rotary frequencies, which ComfyUI reads
from the file, are left out there and follow from two numbers that both released variants share.
"""

from .data import Block, Family, Piece, layer, one, rows

ROPE_THETA, NUM_FREQUENCIES = 10000.0, 16

_SWAPPED = tuple((Piece(name="ff.net.0.proj", part=(index, 2)),) for index in (1, 0))
_LAYERS = (
    layer("attn.qkv_proj", rows("attn.to_q", "attn.to_k", "attn.to_v")),
    layer("attn.out_proj", one("attn.to_out.0")),
    layer("mlp.fc1", _SWAPPED),
    layer("mlp.fc2", one("ff.net.2")),
)
_ADALN = layer("adaln_proj.linear", one("adaln_proj.linear"))
_COPIES = (
    ("attn.norm_q", "attn.q_norm"),
    ("attn.norm_k", "attn.k_norm"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
)

MINIMAX_H3 = Family(
    id="minimax-h3",
    title="MiniMax-H3",
    model_class="MiniMaxH3Transformer3DModel",
    dialect="nunchaku-lite",
    markers=(("transformer_blocks.0.ff.net.2", "audio_proj_in", "audio_proj_out"),),
    native=(),
    blocks=(
        Block(
            source="transformer_blocks",
            target="blocks",
            layers=(*_LAYERS, _ADALN),
            copies=_COPIES,
        ),
        Block(
            source="token_refiner.refiner_blocks",
            target="token_refiner.blocks",
            layers=_LAYERS,
            copies=_COPIES,
        ),
    ),
    rest=(
        ("proj_in", "video_patch_proj"),
        ("audio_proj_in", "audio_patch_proj"),
        ("context_embedder", "condition_proj"),
        ("time_embedder.linear_1", "time_embedder.proj_in"),
        ("time_embedder.linear_2", "time_embedder.proj_out"),
        ("token_refiner.final_norm", "token_refiner.final_norm"),
        ("norm_out.norm", "final_layer.norm"),
        ("norm_out.linear", "final_layer.adaln_proj.linear"),
        ("proj_out", "final_layer.video_out"),
        ("audio_proj_out", "final_layer.audio_out"),
    ),
    constants=(
        (
            "rope.inv_freq",
            tuple(ROPE_THETA ** (-i / NUM_FREQUENCIES) for i in range(NUM_FREQUENCIES)),
        ),
    ),
)
