"""Tiny random-weight models of ComfyUI's own classes, and runs of them on a CPU.

`load(family)` gives a fresh ModelPatcher: through a file and ComfyUI's detection where a small
file can exist (FAMILIES), else built in memory (IN_MEMORY). Random weights compare mechanisms,
never image quality. Needs a ComfyUI, not pytest. Sizes: tiny_image.py, tiny_video.py,
tiny_audio.py, tiny_more.py.
"""

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy_home
import tiny_audio
import tiny_image
import tiny_more
import tiny_video
import torch
from tiny_family import Family

ALL = tiny_image.FAMILIES | tiny_video.FAMILIES | tiny_audio.FAMILIES | tiny_more.FAMILIES
FAMILIES = tuple(name for name, family in ALL.items() if family.in_file)
IN_MEMORY = tuple(name for name, family in ALL.items() if not family.in_file)


def load(family: str, *, heads: int = 1, seed: int = 0) -> Any:
    """A fresh ModelPatcher with fp32 weights on the CPU; files are made once per process.

    heads: attention heads (3 for sequence parallel, so that splits are uneven).
    """
    comfy_home.in_process()
    one = ALL[family]
    heads = max(heads, one.min_heads)
    if not one.in_file:
        return in_memory(_config_class(one), one.unet(heads), seed, shorten=one.shorten)
    import comfy.sd

    path = _file(family, heads, seed)
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def write(folder: Path, family: str, *, heads: int = 1, seed: int = 0) -> Path:
    """Write <folder>/tiny_<family>.safetensors, which ComfyUI's loaders accept."""
    from safetensors.torch import save_file

    one = ALL[family]
    if not one.in_file:
        raise ValueError(f"{family} has no small file: use load('{family}'), it is built in memory")
    heads = max(heads, one.min_heads)
    patcher = in_memory(_config_class(one), one.unet(heads), seed)
    weights = patcher.model.diffusion_model.state_dict()
    metadata = None
    if one.metadata:
        named = {key: one.unet(heads)[key] for key in one.metadata}
        metadata = {"config": json.dumps({"transformer": named})}
    path = Path(folder) / f"tiny_{family}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({one.prefix + k: v.contiguous() for k, v in weights.items()}, path, metadata=metadata)
    return path


def in_memory(
    config_class: Any,
    unet_config: dict[str, Any],
    seed: int = 0,
    *,
    shorten: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """A ModelPatcher of ComfyUI's own config class with a small network, filled with `seed`.

    shorten: path of a ModuleList -> how many of its modules stay. It has no `cached_patcher_init`,
    so no worker process can rebuild it.
    """
    comfy_home.in_process()
    import comfy.model_patcher

    config = config_class(dict(unet_config))
    config.unet_config.update(unet_config)  # over the class's own unet_extra_config
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    for path, length in shorten.items():
        del model.diffusion_model.get_submodule(path)[length:]
    model.diffusion_model.load_state_dict(fill(model.diffusion_model, seed))
    model.diffusion_model.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fill(module: torch.nn.Module, seed: int, gain: float = 0.7) -> dict[str, torch.Tensor]:
    """A state dict with finite, seeded weights: ComfyUI's ops leave parameters uninitialised."""
    generator = torch.Generator().manual_seed(seed)

    def randn(value: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator) * scale

    weights = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            weights[name] = value.clone()
        elif name.endswith("inv_freq"):  # MiniMax-H3 reads its rotary frequencies from the file
            weights[name] = torch.logspace(0, -4, value.numel()).view(value.shape)
        elif name.endswith("modulation"):
            weights[name] = randn(value, 0.3)
        elif value.ndim >= 2:
            weights[name] = randn(value, gain / value[0].numel() ** 0.5)
        elif "norm" in name and name.endswith(("weight", "scale", "gamma")):
            weights[name] = torch.ones(value.shape)
        else:
            weights[name] = randn(value, 0.02)
    return weights


def latent_shape(family: str) -> tuple[Any, ...]:
    """Shape of a latent; a tuple of shapes where the latent is nested (video and audio)."""
    return ALL[family].latent


def latent(family: str) -> Any:
    """An empty latent, as the empty-latent nodes make it."""
    return _zeros(latent_shape(family))


def text(family: str, *, tokens: int = 8, seed: int = 1) -> list[Any]:
    """Random CONDITIONING with everything the family's model needs."""
    one = ALL[family]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    extra: dict[str, Any] = {name: randn(*shape) for name, shape in one.extra.items()}
    extra |= {name: [randn(*shape)] for name, shape in one.lists.items()}
    for name, (count, below, *then) in one.ids.items():
        ids = torch.randint(below, (1, count), generator=generator)
        extra[name] = torch.cat((ids, torch.tensor([then], dtype=ids.dtype)), dim=1)
    if one.mask:  # LTX: an integer mask; a float one would be taken as an additive bias
        extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return [[randn(tokens, one.text_dim), {"pooled_output": randn(one.pooled), **extra}]]


def sample(
    model: Any,
    family: str,
    *,
    steps: int = 2,
    cfg: float = 2.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    split: bool = False,
    seed: int = 1,
    tokens: int = 8,
    shape: tuple[Any, ...] | None = None,
    positive: Any = None,
    negative: Any = None,
    callback: Any = None,
    mask: Any = None,
) -> Any:
    """The latent that KSampler would return.

    split: the negative prompt has another length, so that cond and uncond are separate calls;
    shape: instead of the family's latent; callback(step, denoised, x, total): after each step;
    mask: of an inpainting run, 1 where the picture may change.
    """
    import comfy.sample

    empty = _zeros(shape or latent_shape(family))
    # Flux.2 pads prompts below 512 tokens to 512
    other = (513 if family == "flux2" else tokens + 3) if split else tokens
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, seed),
        steps,
        cfg,
        sampler,
        scheduler,
        positive or text(family, tokens=tokens, seed=1),
        negative or text(family, tokens=other, seed=2),
        empty,
        noise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )


def write_preview_vae(folder: Path, name: str, *, latent_channels: int, seed: int = 0) -> None:
    """TAESD halves for <models>/vae_approx; VAELoader offers "taesd" (SD1.5), "taef1" (Flux)."""
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import save_file

    vae = TAESD(latent_channels=latent_channels)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for half, network in (("encoder", vae.taesd_encoder), ("decoder", vae.taesd_decoder)):
        save_file(fill(network, seed), Path(folder) / f"{name}_{half}.safetensors")


def _zeros(shape: tuple[Any, ...]) -> Any:
    if isinstance(shape[0], int):
        return torch.zeros(shape)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(s) for s in shape])


def _config_class(one: Family) -> Any:
    import comfy.supported_models

    if one.config == "QwenImage21" and not hasattr(comfy.supported_models, one.config):
        import qwen_image21

        return qwen_image21.QwenImage21
    return getattr(comfy.supported_models, one.config)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="slipstream-tiny-")  # removed when Python ends


@functools.cache
def _file(family: str, heads: int, seed: int) -> Path:
    folder = Path(_folder().name) / f"heads{heads}-seed{seed}"
    return write(folder, family, heads=heads, seed=seed)
