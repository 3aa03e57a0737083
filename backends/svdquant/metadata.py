"""The metadata of a converted file: what Nunchaku's loaders need to build the model."""

import json
from typing import Any

from .config import ConvertConfig
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
        **plan.family.quantization,
    }
    texts = {
        "model_class": plan.family.model_class,
        "config": json.dumps(plan.family.config(shapes)),
        "quantization_config": json.dumps(quantization),
        "format": "pt",
    }
    if plan.family.comfy_config is not None:
        texts["comfy_config"] = json.dumps(plan.family.comfy_config(shapes))
    return texts
