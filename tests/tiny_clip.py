"""Tiny text encoders: ComfyUI's own CLIP, tokenizer and encoder classes, with random weights.

Needs a ComfyUI, not pytest. `load(kind)` gives a CLIP, `model(kind)` a MODEL that takes its
prompts; the tokenizers are the real ones that lie in ComfyUI.
"""

import copy
import functools
from typing import Any

import comfy_home
import tiny
import torch
from tiny_family import TEXT

# Width of prompts where the tiny models' own would be too wide, or is not one that SDXL has.
WIDTHS = {"sdxl": 64 + 1280, "qwen_image": 64, "z_image": 64}

_CLIP = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_CLIP_L = {"clip_l": _CLIP | {"hidden_size": TEXT}}
_T5 = {
    "t5xxl": {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "d_model": TEXT},
}
_QWEN = {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "hidden_size": WIDTHS["qwen_image"],
}
# kind -> model name -> what differs from the encoder's own config
CONFIGS: dict[str, dict[str, dict[str, int]]] = {
    "sd15": _CLIP_L,
    "sdxl": {
        "clip_l": _CLIP | {"hidden_size": 64},
        "clip_g": _CLIP | {"hidden_size": 1280},  # the pooled prompt is as wide
    },
    "flux": _CLIP_L | _T5,
    "pixart": _T5,
    "ltxv": _T5,
    "qwen_image": {"qwen25_7b": _QWEN},
    "z_image": {"qwen3_4b": _QWEN},
}
KINDS = tuple(CONFIGS)


@functools.cache
def _loaded(kind: str) -> Any:
    comfy_home.in_process()
    import comfy.sd

    cpu = torch.device("cpu")
    options: dict[str, Any] = {f"{name}_model_config": dict(c) for name, c in CONFIGS[kind].items()}
    options |= {"load_device": cpu, "offload_device": cpu, "initial_device": cpu}
    clip = comfy.sd.CLIP(_target(kind), model_options=options | {"dtype": torch.float32})
    clip.cond_stage_model.load_state_dict(tiny.fill(clip.cond_stage_model, seed=5))
    return clip


def load(kind: str) -> Any:
    """A CLIP of the kind; made once per process, cloned for each call."""
    return _loaded(kind).clone()


FAMILIES = {"pixart": "chroma"}  # of the MODEL, where it is not named as the encoder is
_TEXT_KEYS = {
    "sdxl": "context_dim",
    "qwen_image": "joint_attention_dim",
    "z_image": "cap_feat_dim",
}


def family(kind: str) -> str:
    """The tiny family that takes the prompts of this kind."""
    return FAMILIES.get(kind, kind)


def model(kind: str) -> Any:
    """A tiny MODEL, as wide as this kind's prompts."""
    if kind not in WIDTHS:
        return tiny.load(family(kind))
    one = tiny.ALL[family(kind)]
    config = one.unet(one.min_heads) | {_TEXT_KEYS[kind]: WIDTHS[kind]}
    return tiny.in_memory(tiny._config_class(one), config)


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
