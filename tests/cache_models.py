"""Tiny Flux and Wan for the cache: more blocks than tests/tiny.py's, and a calm time embedding.

A random time embedding jumps with every step, since its fast sinusoids count as much as its slow
ones; trained networks do not listen to the fast ones. `calm` silences them, which brings the
change per step of the first block to what the trained demo model showed (0.06 to 0.13 at 20
steps). Still random weights: mechanisms can be compared, image quality cannot.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import comfy_home
import tiny
import torch

DEEPER = {
    "flux": {"depth": 6, "depth_single_blocks": 8},
    "wan": {"num_layers": 10},
}
TIME_WEIGHTS = {"flux": "time_in.in_layer.weight", "wan": "time_embedding.0.weight"}
NUM_BLOCKS = {"flux": 14, "wan": 10}


def load(family: str, *, calm: bool = True, seed: int = 0) -> Any:
    """A fresh ModelPatcher of the deeper family, from a file and ComfyUI's own loader."""
    comfy_home.in_process()
    import comfy.sd

    path = _file(family, calm, seed)
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def silence_fast_time(weight: torch.Tensor, num_kept: int = 40) -> torch.Tensor:
    """Keep the `num_kept` slowest cosines and sines. weight: [out, 256], both halves fast first."""
    half = weight.shape[1] // 2
    calm = torch.zeros_like(weight)
    for start in (half - num_kept, 2 * half - num_kept):
        calm[:, start : start + num_kept] = weight[:, start : start + num_kept]
    return calm * (half / num_kept) ** 0.5


@functools.cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="slipstream-cache-")  # removed when Python ends


@functools.cache
def _file(family: str, calm: bool, seed: int) -> Path:
    from safetensors.torch import save_file

    one = tiny.ALL[family]
    one = dataclasses.replace(one, sizes={**one.sizes, **DEEPER[family]})
    patcher = tiny.in_memory(tiny._config_class(one), one.unet(1), seed)
    weights = patcher.model.diffusion_model.state_dict()
    if calm:
        name = TIME_WEIGHTS[family]
        weights[name] = silence_fast_time(weights[name])
    metadata = {key: one.unet(1)[key] for key in one.metadata}
    path = Path(_folder().name) / f"{family}-{calm}-{seed}.safetensors"
    save_file(
        {key: value.contiguous() for key, value in weights.items()},
        path,
        metadata={"config": json.dumps({"transformer": metadata})} if metadata else None,
    )
    return path
