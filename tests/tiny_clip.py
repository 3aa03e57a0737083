"""Tiny text encoders: ComfyUI's own CLIP, tokenizer and encoder classes, with random weights.

Needs a ComfyUI, not pytest. `load(kind)` gives a CLIP; the tokenizers are the real ones that lie in
ComfyUI. Widths are those of the tiny models (tiny_family.TEXT), layers are one or two.
"""

import copy
import functools
from typing import Any

import comfy_home
import torch
from tiny import fill
from tiny_family import TEXT

QWEN_TEXT = 64  # width of Qwen's prompts here: its vocabulary alone is 151,936 rows

_CLIP = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_T5 = {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "d_model": TEXT}
_QWEN = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
_QWEN |= {"intermediate_size": 64, "hidden_size": QWEN_TEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip_l": _CLIP | {"hidden_size": TEXT},
    "clip_g": _CLIP | {"hidden_size": 128, "projection_dim": 128},
    "t5xxl": _T5,
    "qwen25_7b": _QWEN,
    "qwen3_4b": _QWEN,
}
KINDS = ("sd15", "sdxl", "flux", "pixart", "qwen_image", "z_image", "ltxv")


@functools.cache
def _loaded(kind: str) -> Any:
    comfy_home.in_process()
    import comfy.sd

    cpu = torch.device("cpu")
    options: dict[str, Any] = {f"{name}_model_config": dict(c) for name, c in CONFIGS.items()}
    options |= {"load_device": cpu, "offload_device": cpu, "initial_device": cpu}
    clip = comfy.sd.CLIP(_target(kind), model_options=options | {"dtype": torch.float32})
    clip.cond_stage_model.load_state_dict(fill(clip.cond_stage_model, seed=5))
    return clip


def load(kind: str) -> Any:
    """A CLIP of the kind; made once per process, cloned for each call."""
    return _loaded(kind).clone()


def _target(kind: str) -> Any:
    import comfy.sdxl_clip as sdxl
    from comfy import sd1_clip
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import flux, lt, pixart_t5, qwen_image, z_image

    tokenizer, encoder = {
        "sd15": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sdxl": (sdxl.SDXLTokenizer, sdxl.SDXLClipModel),
        "flux": (flux.FluxTokenizer, flux.flux_clip()),
        "pixart": (pixart_t5.PixArtTokenizer, pixart_t5.pixart_te()),
        "ltxv": (lt.LTXVT5Tokenizer, lt.ltxv_te()),
        "qwen_image": (qwen_image.QwenImageTokenizer, qwen_image.te()),
        "z_image": (z_image.ZImageTokenizer, z_image.te()),
    }[kind]
    target = ClipTarget(tokenizer, encoder)
    target.params = copy.copy(target.params)
    return target
