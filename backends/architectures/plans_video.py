"""Token plans of the other video families (ComfyUI 0.33)."""

from collections.abc import Callable, Mapping
from typing import Any

from .tokens import Blocks, Gather, GatherOut, Shards, Tok, TokenPlan, ranges

X = Tok(1, ("x",))
IMG, TXT = Tok(1, ("img",)), Tok(1, ("txt",))


# --- LTX-Video


def _refuse_guides(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    if options.get("guide_attention_entries") or arguments.get("guide_attention_entries"):
        return "LTX guide attention entries are not cut"
    return None


LTXV = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks.*",
            layout=("x",),
            args={"x": X, "timestep": X, "pe": X},
            define=("x",),
        ),
    ),
    end=Gather(path="norm_out", args={0: X}),
    local_attention=("transformer_blocks.*.attn2",),
    heads="transformer_blocks.0.attn1.heads",
    refuse=_refuse_guides,
)

# --- LTX-2: video tokens are shared, audio ones (few) stay whole on every rank

V = Tok(1, ("v",))


def _enter_av(shards: Shards, get: Callable[[Any], Any]) -> None:
    if "v" not in shards.full:
        video, audio = get(0)
        shards.define("v", video.shape[1])
        shards.replicate("a", audio.shape[1])


def _video(shards: Shards, x: Any) -> Any:
    video, audio = x
    if video.shape[1] == shards.full["v"]:
        video = shards.cut(video, 1, ("v",))
    return video, audio


def _compressed_timestep(shards: Shards, timestep: Any) -> Any:
    """ComfyUI's CompressedTimestep holds one row per frame and expands to one per token."""
    if not hasattr(timestep, "patches_per_frame"):
        return shards.cut(timestep, 1, ("v",)) if timestep.shape[1] > 1 else timestep
    if timestep.num_frames * timestep.patches_per_frame == 1:
        return timestep
    positions = shards.positions(("v",))

    class Local(type(timestep)):  # type: ignore[misc]
        __slots__ = ()

        def __init__(self) -> None:
            pass

        def expand_for_computation(self, *args: Any, **kwargs: Any) -> Any:
            whole = super().expand_for_computation(*args, **kwargs)
            return tuple(rows[:, positions] for rows in whole)

    local = Local()
    for name in type(timestep).__slots__:
        setattr(local, name, getattr(timestep, name))
    return local


STEP = Tok(fn=_compressed_timestep)
LTXAV = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks.*",
            layout=("v",),
            args={
                0: Tok(fn=_video),
                "v_pe": V,
                "v_cross_pe": V,
                "v_timestep": STEP,
                "v_cross_scale_shift_timestep": STEP,
                "v_cross_gate_timestep": STEP,
            },
            enter=_enter_av,
            attention=(2, 1),
        ),
    ),
    end=Gather(path="norm_out", args={0: V}),
    local_attention=(
        "transformer_blocks.*.attn2",
        "transformer_blocks.*.audio_attn1",
        "transformer_blocks.*.audio_attn2",
        "transformer_blocks.*.audio_to_video_attn",
    ),
    attention_layouts={"transformer_blocks.*.video_to_audio_attn": (("a",), ("v",))},
    heads="transformer_blocks.0.attn1.heads",
)

# --- Cosmos-Predict2 and Anima: tokens stay 5-D in the blocks, so rows of the picture are shared

ROWS = Tok(2, ("h",))


def _enter_cosmos(shards: Shards, get: Callable[[Any], Any]) -> None:
    if "h" not in shards.full:
        _, frames, rows, columns, _ = get("x_B_T_H_W_D").shape
        shards.define("h", rows)
        parts = [frames * n * columns for n in shards.parts["h"]]
        if "h" in shards.replicated:
            shards.replicate("x", frames * rows * columns)
        else:
            shards.define("x", frames * rows * columns, parts=parts)
        shards.memo["size"] = (frames, rows, columns)


def _cosmos_rope(shards: Shards, rope: Any) -> Any:
    """rope [1 or L, L, ...] over (frame, row, column)."""
    frames, rows, columns = shards.memo["size"]
    if rope.shape[1] != frames * rows * columns:
        return rope
    grid = rope.reshape(rope.shape[0], frames, rows, columns, *rope.shape[2:])
    return shards.cut(grid, 2, ("h",)).reshape(rope.shape[0], -1, *rope.shape[2:])


COSMOS_PREDICT2 = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*",
            layout=("x",),
            args={
                "x_B_T_H_W_D": ROWS,
                "rope_emb_L_1_1_D": Tok(fn=_cosmos_rope),
                "extra_per_block_pos_emb": ROWS,
            },
            enter=_enter_cosmos,
        ),
    ),
    end=Gather(path="final_layer", args={0: ROWS}),
    local_attention=("blocks.*.cross_attn",),
)

# --- MiniMax-H3: packed tokens without a batch

MINIMAX_H3 = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*",
            layout=("x",),
            args={"x": Tok(0, ("x",)), "mod_segments": ranges("x"), "rope_freqs": X},
            define=("x",),
        ),
    ),
    end=Gather(path="final_layer", args={"x": Tok(0, ("x",))}),
    rebuilt=("minimax_payload.layout",),
    heads="blocks.0.attn.heads",
)

# --- Kandinsky 5: reshaped to 5-D right behind the blocks

KANDINSKY5 = TokenPlan(
    blocks=(
        Blocks(
            path="visual_transformer_blocks.*",
            layout=("x",),
            args={"visual_embed": X, "freqs": X},
            define=("visual_embed",),
        ),
    ),
    end=GatherOut(path="visual_transformer_blocks.*", tok=X),
    local_attention=("visual_transformer_blocks.*.cross_attention",),
    heads="visual_transformer_blocks.0.self_attention.num_heads",
)

# --- CogVideoX

COGVIDEOX = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*",
            layout=("txt", "img"),
            args={
                "hidden_states": IMG,
                "encoder_hidden_states": TXT,
                "image_rotary_emb": Tok(0, ("img",)),
            },
            define=("hidden_states", "encoder_hidden_states"),
        ),
    ),
    end=Gather(path="norm_final", args={0: IMG}),
    heads="blocks.0.num_heads",
)

# --- Mochi: only the text in front of its padding takes part in attention, so text stays whole


def _enter_mochi(shards: Shards, get: Callable[[Any], Any]) -> None:
    if "img" not in shards.full:
        shards.define("img", get("x").shape[1])
        shards.replicate("txt", min(get("y").shape[1], get("crop_y")))


MOCHI = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*",
            layout=("img", "txt"),
            args={"x": IMG, "rope_cos": Tok(0, ("img",)), "rope_sin": Tok(0, ("img",))},
            enter=_enter_mochi,
        ),
    ),
    end=Gather(path="final_layer", args={"x": IMG}),
    replicate=("txt",),
)

PLANS = {
    "LTXVModel": LTXV,
    "LTXAVModel": LTXAV,
    "MiniTrainDIT": COSMOS_PREDICT2,
    "MiniMaxH3Model": MINIMAX_H3,
    "Kandinsky5": KANDINSKY5,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "AsymmDiTJoint": MOCHI,
}
