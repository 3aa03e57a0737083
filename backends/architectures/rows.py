"""Networks whose rows are not independent samples, so that a batch cannot be cut into parts.

All others do with a row what they do with it alone: tests/host/test_parallel_batch.py compares.
"""

import torch

_HALVES = "it exchanges the halves of a batch"
_KEEPS = "it keeps keys and values of the whole batch between calls"

# Classes of comfy.ldm -> the reason (read in ComfyUI 0.33).
REFUSED = {
    "AceStepConditionGenerationModel": "its first row takes the reference audio of all rows",
    "CausalWanModel": _KEEPS,
    "HunYuanDiTPlain": _HALVES,
    "LatentSeqMMFlowModel": "its rows are parts of one object",
    "NaDiT": _HALVES,
    "Trellis2": "its rows are parts of one object",
    "WanAnimate2Model": _KEEPS,
}
_ONE_ROW = {"MiniMaxH3Model": "MiniMax-H3"}  # these take a batch of one only

# Modules of a U-Net that mix rows: Stable Video Diffusion's are the frames of one video.
_OVER_FRAMES = ("VideoResBlock", "SpatialVideoTransformer")


def why_whole(network: torch.nn.Module) -> str | None:
    """The sentence for a network whose batch cannot be shared, or None."""
    name = type(network).__name__
    if name in _ONE_ROW:
        return (
            f"This model takes one image at a time ({_ONE_ROW[name]}): batch has nothing to share."
        )
    if name in REFUSED:
        return f"A batch of {name} cannot be shared ({REFUSED[name]})."
    if any(type(module).__name__ in _OVER_FRAMES for module in network.modules()):
        return f"A batch of {name} cannot be shared (its rows are the frames of one video)."
    return None
