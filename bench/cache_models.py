"""A Flux of 6 + 8 blocks and a Wan of 10 with random weights and a calm time embedding.

A random time embedding jumps with every step, since its fast sinusoids count as much as its slow
ones; trained networks do not listen to the fast ones. Silencing them brings the change per step of
the first block to what trained models show (0.06 to 0.13 at 20 steps). Random weights all the same:
mechanisms can be compared, image quality cannot. Weights go through a file and ComfyUI's loader.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from .in_process import use_comfyui

FAMILIES = ("flux", "wan")
NUM_BLOCKS = {"flux": 14, "wan": 10}
BLOCK_LISTS = {"flux": ("double_blocks", "single_blocks"), "wan": ("blocks",)}
LATENTS = {"flux": (1, 16, 16, 16), "wan": (1, 16, 2, 16, 16)}
TEXT = 768
_TIME_WEIGHTS = {"flux": "time_in.in_layer.weight", "wan": "time_embedding.0.weight"}


def load(family: str, *, seed: int = 0) -> Any:
    """A fresh ModelPatcher, fp32, by comfy.sd.load_diffusion_model."""
    use_comfyui()
    import comfy.sd

    return comfy.sd.load_diffusion_model(
        str(_file(family, seed)), model_options={"dtype": torch.float32}
    )


def text(*, tokens: int = 8, seed: int = 1) -> list[Any]:
    """Random CONDITIONING with a pooled prompt."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, TEXT, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, TEXT, generator=generator)}]]


def sample(
    model: Any,
    family: str,
    *,
    steps: int = 20,
    cfg: float = 4.0,
    split: bool = False,
    seed: int = 1,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The latent KSampler would return (euler, simple). split: cond and uncond in two calls."""
    import comfy.sample

    empty = torch.zeros(shape or LATENTS[family])
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, seed),
        steps,
        cfg,
        "euler",
        "simple",
        text(seed=1),
        text(seed=2, tokens=11 if split else 8),
        empty,
        disable_pbar=True,
        seed=seed,
    )


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """mean|reference - other| / mean|reference|."""
    return ((reference - other).abs().mean() / reference.abs().mean()).item()


class BlockCounter:
    """Counts blocks that really run, by a hook on the first Linear inside each."""

    def __init__(self, model: Any, family: str):
        self._count = 0
        for name in BLOCK_LISTS[family]:
            for block in getattr(model.model.diffusion_model, name):
                leaf = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
                leaf.register_forward_pre_hook(self._add)

    def _add(self, *args: Any) -> None:
        self._count += 1

    def take(self) -> int:
        """Blocks since the last take."""
        count, self._count = self._count, 0
        return count


def silence_fast_time(weight: torch.Tensor, num_kept: int = 40) -> torch.Tensor:
    """Keep the `num_kept` slowest cosines and sines. weight: [out, 256], both halves fast first."""
    half = weight.shape[1] // 2
    calm = torch.zeros_like(weight)
    for start in (half - num_kept, 2 * half - num_kept):
        calm[:, start : start + num_kept] = weight[:, start : start + num_kept]
    return calm * (half / num_kept) ** 0.5


def _build(family: str) -> torch.nn.Module:
    import comfy.ops

    common = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    if family == "flux":
        from comfy.ldm.flux.model import Flux

        return Flux(
            in_channels=16, out_channels=16, vec_in_dim=TEXT, context_in_dim=TEXT, hidden_size=128,
            mlp_ratio=4.0, num_heads=1, depth=6, depth_single_blocks=8, axes_dim=[16, 56, 56],
            theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
            **common,
        )  # fmt: skip
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", dim=128, ffn_dim=512, num_heads=1, num_layers=10, in_dim=16, out_dim=16,
        text_dim=TEXT, **common,
    )  # fmt: skip


def _fill(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("modulation"):
            weights[name] = noise * 0.3
        elif value.ndim >= 2:
            weights[name] = noise * (0.7 / value[0].numel() ** 0.5)
        elif "norm" in name and name.endswith(("weight", "scale")):
            weights[name] = torch.ones(value.shape)
        else:
            weights[name] = noise * 0.02
    return weights


@functools.cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="slipstream-cache-")  # removed when Python ends


@functools.cache
def _file(family: str, seed: int) -> Path:
    from safetensors.torch import save_file

    with torch.no_grad():
        weights = _fill(_build(family), seed)
    time = _TIME_WEIGHTS[family]
    weights[time] = silence_fast_time(weights[time])
    path = Path(_folder().name) / f"{family}-{seed}.safetensors"
    metadata = {"config": json.dumps({"transformer": {"text_dim": TEXT}})}
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        path,
        metadata=metadata if family == "wan" else None,
    )
    return path
