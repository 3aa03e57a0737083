"""What ComfyUI's own detection makes of a file in its own names (ComfyUI 0.33).

Read from shapes alone, so that a file that ComfyUI does not know costs nothing. Imports happen
when called.
"""

import logging
from typing import Any

import torch

from .. import architectures
from .dialects import Checkpoint
from .errors import CheckpointError
from .families import CORE, READABLE

log = logging.getLogger("slipstream")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def detected_config(checkpoint: Checkpoint) -> Any:
    """ComfyUI's model config (supported_models) of a file in ComfyUI's own names.

    Raises CheckpointError if ComfyUI does not know the model or one of its formats.
    """
    import comfy.model_detection

    _check_formats(checkpoint)
    file = checkpoint.header.path.name
    try:
        found = comfy.model_detection.model_config_from_unet(
            _shapes(checkpoint), "", metadata=checkpoint.header.metadata
        )
    except Exception as error:  # detection indexes what it expects: a damaged file raises anything
        log.warning("ComfyUI's detection of %s failed", file, exc_info=True)
        raise CheckpointError(
            f"{file} is not a model that ComfyUI can detect ({type(error).__name__}: {error}): "
            "it is damaged, or of a variant that is not supported."
        ) from error
    if found is None:
        shown = ", ".join(sorted(checkpoint.layers)[:3])
        raise CheckpointError(
            f"{file} is an SVDQuant file of a model that this ComfyUI does not know (first layers: "
            f"{shown}). Update ComfyUI. In other names than ComfyUI's own, these are read: "
            f"{READABLE}."
        )
    return found


def _check_formats(checkpoint: Checkpoint) -> None:
    """The layers in other formats are ones that this ComfyUI computes."""
    import comfy.quant_ops

    for name, settings in checkpoint.core_layers.items():
        if settings["format"] not in comfy.quant_ops.QUANT_ALGOS:
            raise CheckpointError(
                f"{checkpoint.header.path.name}: layer {name} is quantised as "
                f"{settings['format']}, which this ComfyUI does not know. Update ComfyUI."
            )


def _shapes(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of the network as zeros that take no memory, in its shape and dtype."""
    found = {}
    for name, layer in checkpoint.layers.items():
        found[f"{name}.weight"] = _zeros((layer.num_rows, layer.num_columns), checkpoint.dtype)
        if "bias" in layer.parts:
            found[f"{name}.bias"] = _zeros((layer.num_rows,), checkpoint.dtype)
    for name, key in checkpoint.dense.items():
        entry = checkpoint.header.tensors[key]
        found[name] = _zeros(entry.shape, entry.dtype)
    return found


def _zeros(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.zeros((), dtype=_DTYPES.get(dtype, torch.float32)).expand(shape)


def model_title(network: torch.nn.Module, config: Any) -> str:
    """What users call the model, with the name of ComfyUI's class where that says more."""
    known, name = architectures.find(network), type(config).__name__
    if known is None:
        return name
    return known.name if name == known.name else f"{known.name} ({name})"


def title_of(checkpoint: Checkpoint) -> str:
    """The model's name as far as the header tells it, for Inspect."""
    if checkpoint.family is not CORE:
        return checkpoint.family.title
    return f"{type(detected_config(checkpoint)).__name__} (ComfyUI's own names)"
