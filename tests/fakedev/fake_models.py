"""Tiny models for the fake accelerator: their weights, made before ComfyUI is changed, and runs.

Kinds: fp32, fp8 (weights cast), scaled (ComfyUI's scaled-fp8 checkpoints, `QuantizedTensor`).
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

FAMILIES = ("wan", "flux")
QUEUE_OWNERS = ("ltxav", "minimax_h3")  # their forward drives ComfyUI's block queue
KINDS = ("fp32", "fp8", "scaled")
Weights = tuple[dict[str, torch.Tensor], dict[str, str] | None]


@functools.cache
def weights(family: str, heads: int = 2) -> Weights:
    """State dict and metadata of a tiny model. Call it before fake_comfy.start."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write(Path(folder), family, heads=heads)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()


def load(family: str, kind: str = "fp32", *, disable_dynamic: bool = False) -> Any:
    """A fresh patcher with its own copy of the weights."""
    import comfy.sd

    tensors, metadata = weights(family)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.float32
    if kind == "scaled":
        tensors = _scaled_fp8(tensors)
    options = {} if kind == "scaled" else {"dtype": dtype}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    patcher.cached_patcher_init = (load, (family, kind))
    return patcher


def _scaled_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Block weights as ComfyUI's scaled-fp8 checkpoints store them."""
    out = dict(tensors)
    for key, weight in tensors.items():
        if "blocks." not in key or not key.endswith(".weight") or weight.ndim != 2:
            continue
        name = key.removesuffix("weight")
        scale = weight.abs().max() / 448.0
        out[key] = (weight / scale).to(torch.float8_e4m3fn)
        out[f"{name}weight_scale"] = scale.float()
        note = json.dumps({"format": "float8_e4m3fn"}).encode()
        out[f"{name}comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    return out


def with_lora(patcher: Any, *, rank: int = 4, seed: int = 1) -> Any:
    """A clone with a random LoRA on every block matrix, through ComfyUI's own loader."""
    import comfy.sd

    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for key, weight in patcher.model.state_dict().items():
        if "blocks." in key and key.endswith(".weight") and weight.ndim == 2:
            name = key.removesuffix(".weight")
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            lora[f"{name}.lora_down.weight"] = down * 0.05
            lora[f"{name}.lora_up.weight"] = up * 0.05
    return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]


def sample(patcher: Any, family: str, **options: Any) -> torch.Tensor:
    """tiny.sample on the CPU's side; nested latents (video and audio) end to end."""
    found = tiny.sample(patcher, family, **options).cpu()
    if not getattr(found, "is_nested", False):
        return found
    return torch.cat([part.flatten() for part in found.unbind()])


def blocks(patcher: Any) -> list[torch.nn.Module]:
    network = patcher.model.diffusion_model
    if hasattr(network, "transformer_blocks"):
        return list(network.transformer_blocks)
    if hasattr(network, "double_blocks"):
        return [*network.double_blocks, *network.single_blocks]
    return list(network.blocks)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def state(patcher: Any) -> dict[str, torch.Tensor]:
    """A copy of every weight, on the CPU."""
    return {key: tensor.cpu().clone() for key, tensor in patcher.model.state_dict().items()}
