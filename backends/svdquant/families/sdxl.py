"""SDXL and its finetunes: the linear layers of the UNet's transformer blocks, all signed.

Source: nunchaku 1.2, models/unets/unet_sdxl.py. q, k, v of self-attention are fused; k and v of
cross-attention, projections around the blocks, convolutions and embeddings stay 16-bit, under
diffusers' names. Its loader is strict: nvfp4 files hold wcscales and no wtscale.
"""

from collections.abc import Iterator
from typing import Any

from .data import Block, Family, Shapes, layer, num_blocks, one, part

NUM_LEVELS = 3  # resolutions; attention is in all but the highest one
HEAD_DIM = 64

_LAYERS = (
    *(
        layer(f"attn1.{name}", part("attn1.to_qkv", index, 3), one(f"attn1.{name}"))
        for index, name in enumerate(("to_q", "to_k", "to_v"))
    ),
    *(
        layer(name, one(name))
        for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    ),
)
_COPIES = tuple((name, name) for name in ("norm1", "norm2", "norm3", "attn2.to_k", "attn2.to_v"))
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_AROUND_BLOCKS = tuple((name, name) for name in ("norm", "proj_in", "proj_out"))
_OUTSIDE = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)


def _resnets() -> Iterator[tuple[str, str]]:
    """(diffusers' name, ComfyUI's name) of every resnet: two a level down, three a level up."""
    for level in range(NUM_LEVELS):
        for i in range(2):
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{3 * level + i + 1}.0"
        for i in range(3):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{3 * level + i}.0"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.resnets.1", "middle_block.2"


def _attentions() -> Iterator[tuple[str, str]]:
    """The same of every stack of transformer blocks."""
    for level in range(1, NUM_LEVELS):
        for i in range(2):
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{3 * level + i + 1}.1"
    yield "mid_block.attentions.0", "middle_block.1"
    for level in range(NUM_LEVELS - 1):
        for i in range(3):
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{3 * level + i}.1"


def _resamplers() -> Iterator[tuple[str, str]]:
    for level in range(NUM_LEVELS - 1):
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.2.conv"


def _below(
    owners: Iterator[tuple[str, str]], names: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    return tuple((f"{a}.{theirs}", f"{b}.{ours}") for a, b in owners for theirs, ours in names)


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel config."""
    first = [3 * level + 1 for level in range(NUM_LEVELS)]  # a level's first input block
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    depths = [num_blocks(shapes, f"input_blocks.{i}.1.transformer_blocks") for i in first]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    cross = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "attention_head_dim": [width // HEAD_DIM for width in widths],  # diffusers: heads
        "cross_attention_dim": shapes[cross][1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        "norm_eps": 1e-05,
    }


_FIRST = "down_blocks.1.attentions.0.transformer_blocks.0"
SDXL = Family(
    id="sdxl",
    title="SDXL",
    model_class="NunchakuSDXLUNet2DConditionModel",
    dialect="nunchaku-1",
    markers=(
        (f"{_FIRST}.attn1.to_qkv", "add_embedding.linear_1"),
        (f"{_FIRST}.attn1.to_q", "add_embedding.linear_1"),
    ),
    native=(
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.7.1.transformer_blocks.1.attn1.to_q",  # Stable Diffusion 1 and 2: only .0
        "middle_block.1.transformer_blocks.0.attn1.to_q",
        "label_emb.0.0",
    ),
    blocks=tuple(
        Block(
            source=f"{theirs}.transformer_blocks",
            target=f"{ours}.transformer_blocks",
            layers=_LAYERS,
            copies=_COPIES,
        )
        for theirs, ours in _attentions()
    ),
    rest=(
        *_OUTSIDE,
        *_below(_resnets(), _RESNET),
        *_below(_attentions(), _AROUND_BLOCKS),
        *_resamplers(),
    ),
    diffusers_config=diffusers_config,
    fp4_rows=True,
)
