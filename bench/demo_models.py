"""A models folder for the demo: the trained Flux and its VAE, and a Wan with random weights.

The trained files are those of demo_weights/, made by train_demo.py; demo_pack's node reads the
vectors of their classes. The Wan is written with ComfyUI's own class, in its Python; random weights
show mechanisms, its clips are noise.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

FLUX, WAN = "slipstream_demo_flux.safetensors", "slipstream_demo_wan.safetensors"
VAE = "slipstream_demo_vae.safetensors"
CLASS_VECTORS = "slipstream_demo_classes.safetensors"
WEIGHTS = Path(__file__).resolve().parent / "demo_weights"
TEXT_DIM = 1024  # of the Wan: core's LotusConditioning gives [1, 2, 1024]
_WIDTH = 128  # ComfyUI's detection takes a Wan's heads as width / 128
_TRAINED = {FLUX: "diffusion_models", VAE: "vae", CLASS_VECTORS: "embeddings"}


def write(comfyui: Path, folder: Path) -> None:
    """Fill `folder`, a models folder, from the ComfyUI at `comfyui`; about 20 MB.

    The folder appears complete or not at all.
    """
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # before anything of ComfyUI picks a device
    import comfy.ops
    import torch

    build = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    unfinished = folder.with_name(folder.name + ".part")
    text = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}  # not in Wan's weights
    _save(unfinished / "diffusion_models" / WAN, _wan(build), seed=1, metadata=text)
    for name, kind in _TRAINED.items():
        (unfinished / kind).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(WEIGHTS / name, unfinished / kind / name)
    unfinished.rename(folder)


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
        if name.endswith("modulation"):
            weights[name] = noise * 0.3
        elif value.ndim > 1:
            weights[name] = noise * 0.7 / value[0].numel() ** 0.5
        elif "norm" in name and name.endswith(("weight", "scale")):
            weights[name] = torch.ones_like(value)
        else:
            weights[name] = noise * 0.02
    return weights
