"""What ComfyUI's own detection makes of a file (ComfyUI 0.33).

Read from shapes alone, so that a file that ComfyUI does not know costs nothing. Imports happen
when called.
"""

import logging
from typing import Any

import torch

from .. import architectures
from .assemble import Assembler, assemble
from .dialects import Checkpoint
from .errors import CheckpointError
from .families import CORE, READABLE
from .segments import WithBias
from .weight import Facts, QuantWeight, Segment

log = logging.getLogger("slipstream")
_MAX_VALUES = 65536  # a vector of up to so many elements is read: detection looks into norms


def detected_config(checkpoint: Checkpoint, state: dict[str, torch.Tensor] | None = None) -> Any:
    """ComfyUI's model config (supported_models) of a file.

    state: its outline, if there is one already. Raises CheckpointError if ComfyUI does not know the
    model or one of its formats.
    """
    import comfy.model_detection

    _check_formats(checkpoint)
    file = checkpoint.header.path.name
    try:
        found = comfy.model_detection.model_config_from_unet(
            outline(checkpoint) if state is None else state,
            "",
            metadata=checkpoint.header.metadata if checkpoint.native else None,
        )
    except Exception as error:  # detection indexes what it expects: a damaged file raises anything
        log.warning("ComfyUI's detection of %s failed", file, exc_info=True)
        raise CheckpointError(
            f"{file} is not a model that ComfyUI can detect ({type(error).__name__}: {error}): "
            "it is damaged, or of a variant that is not supported."
        ) from error
    if found is None and checkpoint.family is not CORE:
        raise CheckpointError(
            f"{file}: ComfyUI does not know this {checkpoint.family.title} variant. Update ComfyUI."
        )
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


def outline(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's tensors under ComfyUI's names, on the meta device; vectors with values."""
    return {
        name: _meta(*value.shape) if isinstance(value, QuantWeight) else value
        for name, value in assemble(checkpoint, torch.float32, kind=_Outliner)
    }


class _Outliner(Assembler):
    """Assembles shapes: what is quantised has no parts, what is not a vector no values."""

    def tensor(self, name: str) -> torch.Tensor:
        self.used.add(name)
        shape = self.checkpoint.header.tensors[self.checkpoint.dense[name]].shape
        if len(shape) == 1 and shape[0] <= _MAX_VALUES:
            return self.reader.file.get_tensor(self.checkpoint.dense[name])
        return _meta(*shape)

    def read(self, piece: Any, chunks: int) -> WithBias:
        layer = self.checkpoint.layers[piece.name]
        facts = Facts("outline", 0, layer.num_rows, 0, layer.num_columns)
        bias = _meta(layer.num_rows) if "bias" in layer.parts else None
        return Segment(facts, _meta(0), _meta(0)), bias

    def rows(self, segment: Segment, start: int, size: int, count: int) -> Segment:
        facts = segment.facts
        return Segment(Facts(facts.precision, 0, size, 0, facts.num_columns), segment.q, _meta(0))

    def quantised(self, grid: Any, chunks: int) -> tuple[QuantWeight, torch.Tensor | None]:
        parts = [self.layer(piece, chunks) for row in grid for piece in row]
        facts = [segment.facts for segment, _ in parts]
        num_rows, num_columns = facts[0].num_rows, facts[0].num_columns
        if len(grid) > 1:
            num_rows = sum(f.num_rows for f in facts)
        else:
            num_columns = sum(f.num_columns for f in facts)
        has_bias = any(bias is not None for _, bias in parts)
        return QuantWeight((num_rows, num_columns), ()), _meta(num_rows) if has_bias else None


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


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
