"""Tiny demo models with random weights, written with ComfyUI's own classes. Runs in its Python.

A Flux and a Wan that UNETLoader takes, and a TAESD-format VAE that VAELoader takes. Their text
width is that of core's LotusConditioning, a constant prompt, so that no text encoder is needed.
Random weights show mechanisms; the pictures are noise.
"""

import json
import sys
from pathlib import Path
from typing import Any

FLUX, WAN = "slipstream_demo_flux.safetensors", "slipstream_demo_wan.safetensors"
VAE = "slipstream_demo_vae.safetensors"
TEXT_DIM = 1024  # LotusConditioning: [1, 2, 1024]
_WIDTH = 128  # ComfyUI's detection takes Flux and Wan heads as width / 128


def write(comfyui: Path, folder: Path) -> None:
    """Fill `folder`, a models folder, from the ComfyUI at `comfyui`; about 25 MB.

    The folder appears complete or not at all.
    """
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # before anything of ComfyUI picks a device
    import comfy.ops
    import torch
    from comfy.taesd.taesd import TAESD

    build = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    unfinished = folder.with_name(folder.name + ".part")
    _save(unfinished / "diffusion_models" / FLUX, _flux(build), seed=0)
    text = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}  # not in Wan's weights
    _save(unfinished / "diffusion_models" / WAN, _wan(build), seed=1, metadata=text)
    _save(unfinished / "vae" / VAE, TAESD(latent_channels=16), seed=2)
    unfinished.rename(folder)


def _flux(build: dict[str, Any]) -> Any:
    """2 dual-stream and 8 single-stream blocks, no guidance embedding (schnell)."""
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=64,
        context_in_dim=TEXT_DIM,
        hidden_size=_WIDTH,
        mlp_ratio=4.0,
        num_heads=1,
        depth=2,
        depth_single_blocks=8,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        **build,
    )


def _wan(build: dict[str, Any]) -> Any:
    """4 blocks of self- and cross-attention."""
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v",
        dim=_WIDTH,
        ffn_dim=512,
        num_heads=1,
        num_layers=4,
        in_dim=16,
        out_dim=16,
        text_dim=TEXT_DIM,
        **build,
    )


def _save(path: Path, network: Any, *, seed: int, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_weights(network, seed), path, metadata=metadata)


def _weights(network: Any, seed: int) -> dict[str, Any]:
    """Seeded and finite: ComfyUI's layers leave their parameters uninitialised."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.startswith("vae_"):  # TAESD's scale and shift
            weights[name] = value.clone()
        elif name.endswith("modulation"):
            weights[name] = noise * 0.3
        elif value.ndim > 1:
            weights[name] = noise * 0.7 / value[0].numel() ** 0.5
        elif "norm" in name and name.endswith(("weight", "scale")):
            weights[name] = torch.ones_like(value)
        else:
            weights[name] = noise * 0.02
    return weights
