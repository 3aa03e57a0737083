"""The metadata of a converted file: what Nunchaku's loaders need to build the model."""

import json
from typing import Any

from .config import ConvertConfig
from .families.data import Shapes, num_blocks
from .header import Header
from .layouts import GROUP
from .plan import Plan


def metadata(plan: Plan, header: Header, config: ConvertConfig) -> dict[str, str]:
    """The metadata that Nunchaku's loaders read, as text."""
    shapes = {
        name.removeprefix(plan.prefix): entry.shape
        for name, entry in header.tensors.items()
        if name.startswith(plan.prefix)
    }
    fp4 = config.precision == "nvfp4"
    numbers: dict[str, Any] = {
        "dtype": "fp4_e2m1_all" if fp4 else "int4",
        "group_size": GROUP[config.precision],
    }
    quantization: dict[str, Any] = {
        "method": "svdquant",
        "weight": {**numbers, "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": {**numbers, "scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": config.rank,
    }
    if plan.family.id == "z-image":
        quantization["skip_refiners"] = False
    texts = {
        "model_class": plan.family.model_class,
        "config": json.dumps(plan.family.diffusers_config(shapes)),
        "quantization_config": json.dumps(quantization),
        "format": "pt",
    }
    if plan.family.id == "flux":
        texts["comfy_config"] = json.dumps(_comfy_config(shapes))
    return texts


def _comfy_config(shapes: Shapes) -> dict[str, Any]:
    """ComfyUI's Flux settings, which ComfyUI-nunchaku reads instead of detecting the model."""
    hidden, in_channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.weight"][0]

    model = {
        "image_model": "flux",
        "in_channels": in_channels // 4,
        "out_channels": shapes["final_layer.linear.weight"][0] // 4,
        "patch_size": 2,
        "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        "num_heads": hidden // head,
        "depth": num_blocks(shapes, "double_blocks"),
        "depth_single_blocks": num_blocks(shapes, "single_blocks"),
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        "disable_unet_model_creation": True,
    }
    name = "Flux" if model["guidance_embed"] else "FluxSchnell"
    return {"model_class": name, "model_config": model}
