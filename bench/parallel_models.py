"""Networks of random weights, as large as a measurement of sequence parallel wants them."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "slipstream_bench.safetensors"
WAN, FLUX, SDXL = "wan", "flux", "sdxl"
_NAMES = {WAN: "Wan", FLUX: "Flux", SDXL: "SDXL"}
_PIXELS, _FRAMES = 16, 4  # of one token, per axis


@dataclass(frozen=True)
class Subject:
    """A network's sizes, and what it samples: pixels, frames and how many at once.

    prefix: of the keys in its file; channels: of its latent; text, pooled: widths of its prompt.
    Core's LotusConditioning gives the Wan's.
    """

    network: dict[str, Any]
    width: int
    height: int
    frames: int = 1
    dtype: str = "float32"
    family: str = WAN
    batch: int = 1
    channels: int = 16
    text: int = 1024
    pooled: int = 768
    prefix: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return (self.width // _PIXELS) * (self.height // _PIXELS) * self.latent_frames

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // _FRAMES + 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        frames = (self.latent_frames,) if self.family == WAN else ()
        return (self.batch, self.channels, *frames, self.height // 8, self.width // 8)

    @property
    def text_tokens(self) -> int:
        return 2 if self.family == WAN else 77

    @property
    def latent_node(self) -> tuple[str, dict[str, int]]:
        """Core's node for its empty latent: class and inputs."""
        sizes = {"width": self.width, "height": self.height, "batch_size": self.batch}
        if self.family == WAN:
            return "EmptyHunyuanLatentVideo", {**sizes, "length": self.frames}
        return ("EmptySD3LatentImage" if self.family == FLUX else "EmptyLatentImage"), sizes

    def __str__(self) -> str:
        sizes = {n: v for n, v in self.network.items() if isinstance(v, int)}
        shown = ", ".join(f"{name} {value}" for name, value in sizes.items())
        if self.family == WAN:
            shown = (
                f"width {sizes['dim']}, {sizes['num_heads']} heads, {sizes['num_layers']} blocks"
            )
        frames = f", {self.frames} frames" if self.family == WAN else ""
        tokens = "" if self.family == SDXL else f": {self.num_tokens:,} tokens"
        batch = f", batch of {self.batch}" if self.batch > 1 else ""
        return (
            f"{_NAMES[self.family]} of random weights ({shown}, {self.dtype}), {self.width} x "
            f"{self.height}{frames}{tokens}{batch}"
        )


_WAN_TEXT = {"config": json.dumps({"transformer": {"text_dim": 1024}})}  # not in its weights
_UNET: dict[str, Any] = {  # as deep as Segmind Vega, which ComfyUI has as an SDXL, but narrow
    "model_channels": 320, "channel_mult": (1, 1, 1), "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "num_head_channels": 64,
    "adm_in_channels": 2816, "context_dim": 2048, "in_channels": 4, "out_channels": 4,
    "image_size": 32, "num_heads": -1, "num_classes": "sequential", "legacy": False,
    "use_spatial_transformer": True, "use_linear_in_transformer": True,
}  # fmt: skip
_FLUX: dict[str, Any] = {
    "hidden_size": 512, "num_heads": 4, "depth": 2, "depth_single_blocks": 4, "in_channels": 16,
    "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 1024,
    "mlp_ratio": 4.0, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [], "image_model": "flux",
}  # fmt: skip

SUBJECTS = {
    "wan-small": Subject(
        {"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 3}, 512, 512, 29,
        metadata=_WAN_TEXT,
    ),
    "wan-1.3b": Subject(
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 832, 480, 81,
        "bfloat16", metadata=_WAN_TEXT,
    ),
    "wan": Subject(
        {"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 3}, 256, 256, 9,
        metadata=_WAN_TEXT,
    ),
    "flux": Subject(_FLUX, 512, 512, family=FLUX),
    "sdxl": Subject(
        _UNET, 256, 256, family=SDXL, channels=4, text=2048, pooled=1280,
        prefix="model.diffusion_model.",
    ),
}  # fmt: skip


def _class_of(subject: Subject) -> Callable[..., Any]:
    """ComfyUI's class of the network."""
    if subject.family == FLUX:
        from comfy.ldm.flux.model import Flux

        return Flux
    if subject.family == SDXL:
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel
    from comfy.ldm.wan.model import WanModel

    def wan(**options: Any) -> Any:
        sizes = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "text_dim": subject.text}
        return WanModel(**sizes, **options)

    return wan


def network_of(comfyui: Path, subject: Subject) -> Any:
    """ComfyUI's own network on the CPU, filled."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True  # as in the measured server
    import comfy.ops
    import torch

    from .demo_models import _weights

    network = _class_of(subject)(
        **subject.network, dtype=getattr(torch, subject.dtype), device="cpu",
        operations=comfy.ops.disable_weight_init,
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
    save_file(
        {subject.prefix + name: value for name, value in weights.items()},
        place / FILE,
        metadata=subject.metadata or None,
    )


def inputs_of(subject: Subject) -> dict[str, Any]:
    """Arguments of one call of its network, the latent first."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = subject.batch
    found = {"x": randn(*subject.latent_shape)}
    found["timesteps" if subject.family == SDXL else "timestep"] = torch.full((rows,), 500.0)
    found["context"] = randn(rows, subject.text_tokens, subject.text)
    if subject.family != WAN:
        found["y"] = randn(rows, subject.network.get("adm_in_channels", subject.pooled))
    if subject.family == FLUX:
        found["guidance"] = torch.full((rows,), 3.5)
    return found
