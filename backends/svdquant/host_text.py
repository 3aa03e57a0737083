"""Loads 4-bit text encoders as ComfyUI's own CLIP (ComfyUI 0.33).

ComfyUI's classes, tokenizers and detection do everything but the quantised layers. Imports happen
when called.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from .. import host
from .config import SVDQuantConfig
from .dialects import DIALECTS
from .engine import Engine
from .errors import CheckpointError
from .header import read_header
from .host import ReadModel, read_model
from .host_dtype import DTYPES
from .host_operations import operations
from .host_patcher import quantised_layers, with_patcher
from .kernels import Dequant, Kernel
from .layout import is_quantised
from .measure import prove
from .technique import size_text
from .text_files import detect_text
from .weight import Segment

log = logging.getLogger("slipstream")
GEMV_ROWS = 16  # unverified on a GPU: up to here a matrix-vector kernel is meant to be faster
_HEADERS = (".safetensors", ".sft")
_DEFAULT_PAIR = "sdxl"  # of ComfyUI's loader for two files: what it takes a pair for by default


class TextEngine(Engine):
    """An Engine for text encoders: unpacked weights where ComfyUI's precision is asked for (fp32,
    auto), and for many tokens of a weight-only layer instead of one product per token."""

    def kernel(self, segment: Segment, x: torch.Tensor) -> Kernel:
        many = segment.facts.precision == "awq" and x.shape[0] > GEMV_ROWS
        if (many and self.backend != "reference") or (
            self.backend == "auto" and x.dtype == torch.float32
        ):
            return _DEQUANT
        return super().kernel(segment, x)


_DEQUANT = Dequant()


def clip_types() -> list[str]:
    """ComfyUI's names of what a text encoder is for, as its own loader nodes spell them."""
    import comfy.sd

    return [*(name.lower() for name in comfy.sd.CLIPType.__members__), _DEFAULT_PAIR]


def text_encoder_names() -> list[str]:
    """Names in ComfyUI's text_encoders folders, for a widget."""
    import folder_paths

    return folder_paths.get_filename_list("text_encoders")


def text_encoder_path(name: str) -> str:
    """The path of a file there. Raises CheckpointError if it is gone."""
    import folder_paths

    found = folder_paths.get_full_path("text_encoders", name)
    if found is None:
        raise CheckpointError(f"{name} is not in a text_encoders folder: refresh the list")
    return str(found)


def load_clip(
    paths: list[str],
    clip_type: str,
    config: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
    model_options: dict[str, Any] | None = None,
) -> Any:
    """A CLIP from one or more files, of which at least one has 4-bit layers.

    clip_type: one of clip_types; model_options: more of ComfyUI's own. Raises ValueError with the
    sentence for the user.
    """
    import comfy.model_management
    import comfy.sd
    import folder_paths

    settings = SVDQuantConfig.from_json(config or {})
    device = comfy.model_management.text_encoder_device()
    # ComfyUI computes text encoders in fp32, whatever their weights have: T5 overflows fp16
    dtype = torch.float32 if settings.dtype == "auto" else DTYPES[settings.dtype]
    engine = TextEngine(settings.backend, compute=dtype)
    models = {path: _read(Path(path), engine, dtype, device) for path in paths}
    counts = {path: num_quantised(model) for path, model in models.items()}
    if not any(counts.values()):
        raise CheckpointError(
            f"{', '.join(Path(p).name for p in paths)}: no 4-bit layers in a form that this loader "
            "knows (Nunchaku's AWQ T5; comfy-kitchen's svdquant_w4a4, awq_w4a16). Use Load CLIP."
        )
    samples = {k: v for model in models.values() for k, v in model.samples.items()}
    prove(samples, device, engine, comfy.model_management.free_memory)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [model.state for model in models.values()],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
        model_options={**(model_options or {}), "custom_operations": operations(engine)},
        disable_dynamic=disable_dynamic,
    )
    check_layers(clip.cond_stage_model, counts, clip_type)
    with_patcher(clip.patcher)
    arguments = (paths, clip_type, settings.to_json())
    clip.patcher.cached_patcher_init = (load_clip_patcher, arguments)
    text = summary(models, dtype)
    log.info("%s", text)
    host.show_text_on_running_node(text)
    return clip


def load_clip_patcher(
    paths: list[str], clip_type: str, config: dict[str, Any], disable_dynamic: bool = False
) -> Any:
    """The patcher of the same CLIP: how ComfyUI makes a clone without dynamic VRAM."""
    return load_clip(paths, clip_type, config, disable_dynamic).patcher


def _read(path: Path, engine: Engine, dtype: torch.dtype, device: torch.device) -> ReadModel:
    """A file's tensors under its own names; one without 4-bit layers as ComfyUI reads it."""
    import comfy.utils

    checkpoint = detect_text(read_header(path)) if path.suffix in _HEADERS else None
    if checkpoint is not None:
        model = read_model(checkpoint, engine, dtype, device)
        model.form = DIALECTS[checkpoint.dialect]
        return model
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
    if comfy.utils.detect_layer_quantization(state, "") is not None:
        raise CheckpointError(
            f"{path.name} is quantised in a form of ComfyUI's own (fp8, nvfp4, ...), which cannot "
            "be mixed with a 4-bit text encoder here: choose its 16-bit file."
        )
    return ReadModel(state=state)


def num_quantised(model: ReadModel) -> int:
    """How many of a file's tensors are 4-bit weights."""
    return sum(is_quantised(value) for value in model.state.values())


def check_layers(network: torch.nn.Module, counts: dict[str, int], clip_type: str) -> None:
    """Every 4-bit weight became a layer's, and no layer among them stayed without one.

    ComfyUI only logs either. What a file may leave out (a vision tower, CLIP-L's projection) is
    zero, where ComfyUI leaves what was in memory.
    """
    taken, given = quantised_layers(network), sum(counts.values())
    files = ", ".join(Path(path).name for path, count in counts.items() if count)
    if len(taken) != given:
        raise CheckpointError(
            f"{files}: ComfyUI's text encoder of type {clip_type} takes {len(taken)} of its "
            f"{given} 4-bit layers. Choose the type that the file is for, or update ComfyUI."
        )
    stacks = {_stack(name) for name in taken}
    empty = {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "has_bias") and module.weight is None
    }
    lacking = [name for name in empty if _stack(name) in stacks]
    if lacking:
        raise CheckpointError(
            f"{files} lacks {len(lacking)} layers of the text encoder "
            f"({', '.join(lacking[:3])}): it is truncated, or a variant that ComfyUI does not know"
        )
    if empty:
        log.warning("%d weights are in no file: %s", len(empty), ", ".join(list(empty)[:3]))
    for module in empty.values():
        shape, dtype = (module.out_features, module.in_features), module.weight_comfy_model_dtype
        module.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def _stack(name: str) -> str:
    """The name of the list of blocks that a layer is in."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:first])


def summary(models: dict[str, ReadModel], dtype: torch.dtype) -> str:
    """A line per file: layers and bytes that are 4-bit."""
    lines = []
    for path, model in models.items():
        name, count = Path(path).name, num_quantised(model)
        if count:
            size = size_text(model.weight_bytes)
            computed = str(dtype).removeprefix("torch.")
            lines.append(f"{name}: {count} 4-bit layers ({model.form}), {size}, in {computed}")
        else:
            lines.append(f"{name}: as ComfyUI loads it")
    return "\n".join(lines)
