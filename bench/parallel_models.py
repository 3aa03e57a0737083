"""Wan networks of random weights, as large as a measurement of sequence parallel wants them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "slipstream_bench_wan.safetensors"
_TEXT_DIM = 1024  # core's LotusConditioning gives [1, 2, 1024]
_PIXELS, _FRAMES = 16, 4  # of one token, per axis


@dataclass(frozen=True)
class Subject:
    """A network's sizes, and the video it samples, in pixels and frames."""

    network: dict[str, int]
    width: int
    height: int
    frames: int
    dtype: str = "float32"

    @property
    def num_tokens(self) -> int:
        return (self.width // _PIXELS) * (self.height // _PIXELS) * self.latent_frames

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // _FRAMES + 1

    def __str__(self) -> str:
        return (
            f"Wan of random weights (width {self.network['dim']}, {self.network['num_heads']} "
            f"heads, {self.network['num_layers']} blocks, {self.dtype}), {self.width} x "
            f"{self.height}, {self.frames} frames: {self.num_tokens:,} tokens"
        )


SUBJECTS = {
    "wan-small": Subject(
        {"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 3}, 512, 512, 29
    ),
    "wan-1.3b": Subject(
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 832, 480, 81, "bfloat16"
    ),
}


def network_of(comfyui: Path, subject: Subject) -> Any:
    """ComfyUI's WanModel on the CPU, filled."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True  # as in the measured server
    import comfy.ops
    import torch
    from comfy.ldm.wan.model import WanModel

    from .demo_models import _weights

    network = WanModel(
        model_type="t2v", in_dim=16, out_dim=16, text_dim=_TEXT_DIM, **subject.network,
        dtype=getattr(torch, subject.dtype), device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    weights = {n: v.to(network.dtype) for n, v in _weights(network, 1).items()}
    network.load_state_dict(weights)
    return network.eval()


def write_model(comfyui: Path, folder: Path, subject: Subject) -> None:
    """The network as a file that ComfyUI's loader accepts, in <folder>/diffusion_models."""
    from safetensors.torch import save_file

    weights = network_of(comfyui, subject).state_dict()
    place = folder / "diffusion_models"
    place.mkdir(parents=True, exist_ok=True)
    config = {"config": json.dumps({"transformer": {"text_dim": _TEXT_DIM}})}
    save_file(weights, place / FILE, metadata=config)


def inputs_of(subject: Subject) -> tuple[Any, Any, Any]:
    """x, timestep and context of one call of its network."""
    import torch

    shape = (1, 16, subject.latent_frames, subject.height // 8, subject.width // 8)
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=generator) for s in (shape, (1, 2, _TEXT_DIM)))
    return x, torch.tensor([500.0]), text
