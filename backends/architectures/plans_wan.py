"""Token plans of the Wan family (comfy/ldm/wan/model.py, ComfyUI 0.33).

Not here, so refused by name: Animate, HuMo, MultiTalk, Dancer and the causal model.
"""

from dataclasses import replace
from typing import Any

from .tokens import Blocks, Gather, Island, Shards, Tok, TokenPlan

X = Tok(1, ("x",))


def _modulation(shards: Shards, e: Any) -> Any:
    """Per-frame modulation [B,F,6,C] as one row per local token.

    The block repeats `e` by the local length over the number of frames, which is wrong for a
    part of the sequence; one row per token is repeated once.
    """
    if e.ndim < 4 or e.shape[1] == 1:
        return e
    total, num_frames = shards.full["x"], e.shape[1]
    per_frame = -(-total // num_frames)
    return e[:, [position // per_frame for position in shards.positions(("x",))]]


E = Tok(fn=_modulation)

WAN = TokenPlan(
    blocks=(
        Blocks(path="blocks.*", layout=("x",), args={"x": X, "freqs": X, "e": E}, define=("x",)),
    ),
    end=Gather(path="head", args={"x": X}),
    local_attention=("blocks.*.cross_attn",),
)
VACE = replace(
    WAN,
    blocks=(
        *WAN.blocks,
        Blocks(path="vace_blocks.*", layout=("x",), args={"c": X, "x": X, "freqs": X, "e": E}),
    ),
    local_attention=("blocks.*.cross_attn", "vace_blocks.*.cross_attn"),
)
S2V = replace(WAN, islands=(Island(path="audio_injector", args={"x": X}, out=X),))

PLANS = {
    "WanModel": WAN,
    "VaceWanModel": VACE,
    "CameraWanModel": WAN,
    "WanModel_S2V": S2V,
    "SCAILWanModel": WAN,  # pose tokens follow those of the video, in the blocks and in freqs
}
