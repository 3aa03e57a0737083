"""What ComfyUI's memory managers hold: sizes of one MODEL, and every model that is loaded.

Only reads. Classic and dynamic managers as in ComfyUI 0.33; names of comfy.* are imported when
called, and without ComfyUI nothing is loaded.
"""

import sys
from typing import Any

from .section import LoadedModel

CAP = "slipstream_cap_bytes"  # attribute of a patcher under a budget: bytes that may be resident


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI's dynamic memory manager (VBAR) loads this MODEL."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if ask is not None else False


def weight_bytes(patcher: Any) -> int:
    """Bytes of all weights, as ComfyUI counts them."""
    return int(patcher.model_size())


def placed_bytes(patcher: Any) -> int:
    """Bytes of all weights on the load device, where they may have another dtype (dynamic).

    Known once the model was loaded; before that it is what they take in RAM.
    """
    vbar = patcher._vbar_get() if is_dynamic(patcher) else None
    if vbar is None:
        return weight_bytes(patcher)
    return int(vbar.offset) + forced_bytes(patcher)


def resident_bytes(patcher: Any) -> int:
    """Bytes of weights on the load device now; a VBAR counts pages of 32 MiB."""
    return min(int(patcher.loaded_size()), placed_bytes(patcher))


def forced_bytes(patcher: Any) -> int:
    """Dynamic: bytes of the small weights that ComfyUI loads beside its VBAR; classic: 0."""
    return int(patcher.model.model_loaded_weight_memory) if is_dynamic(patcher) else 0


def pinned_bytes(patcher: Any) -> int:
    """Bytes of the model's weights in page-locked RAM."""
    if is_dynamic(patcher):
        return int(patcher.pinned_memory_size())
    total = 0
    for key in getattr(patcher, "pinned", ()):
        weight: Any = patcher.model
        for part in key.split("."):
            weight = getattr(weight, part)
        total += weight.nbytes
    return total


def reserve_bytes() -> int:
    """What ComfyUI leaves to other programs (--reserve-vram); 0 without ComfyUI."""
    if "comfy" not in sys.modules:
        return 0
    import comfy.model_management as management

    return int(management.extra_reserved_memory())


def loaded_models(sampled: Any) -> list[LoadedModel]:
    """Every model that ComfyUI holds now, in its own order; empty without ComfyUI.

    sampled: the patcher of the run, whose model is marked.
    """
    if "comfy" not in sys.modules:
        return []
    import comfy.model_management as management

    found = []
    for entry in getattr(management, "current_loaded_models", ()):
        if entry.model is None:
            continue
        try:
            found.append(_describe(entry.model, sampled))
        except (AttributeError, KeyError):  # another pack's patcher: not worth a failed run
            continue
    return found


def _describe(patcher: Any, sampled: Any) -> LoadedModel:
    total = placed_bytes(patcher)
    is_sampled = patcher.model is sampled.model
    return LoadedModel(
        key=id(patcher.model),
        name=_name(patcher),
        kind=_kind(patcher),
        device=str(patcher.load_device),
        total_bytes=total,
        loaded_bytes=resident_bytes(patcher),
        pinned_bytes=pinned_bytes(patcher),
        is_dynamic=is_dynamic(patcher),
        on_cpu=patcher.load_device.type == "cpu",
        is_sampled=is_sampled,
        is_capped=is_sampled and getattr(sampled, CAP, None) is not None,
    )


def _name(patcher: Any) -> str:
    """The class of the network, as users know it: Flux, WanModel, AutoencoderKL, SD3ClipModel."""
    network = getattr(patcher.model, "diffusion_model", patcher.model)
    return type(network).__name__.strip("_")


def _kind(patcher: Any) -> str:
    if hasattr(patcher.model, "diffusion_model"):
        return "diffusion model"
    if getattr(patcher, "is_clip", False):
        return "text encoder"
    name = type(patcher.model).__name__.lower()
    return "VAE" if "autoencod" in name or "vae" in name or "taesd" in name else "model"


def start_flags() -> frozenset[str]:
    """The memory flags that this ComfyUI was started with."""
    if "comfy.cli_args" not in sys.modules:
        return frozenset()
    from comfy.cli_args import args

    names = ("lowvram", "novram", "disable_smart_memory", "cpu_vae", "reserve_vram")
    return frozenset("--" + n.replace("_", "-") for n in names if getattr(args, n, None))
