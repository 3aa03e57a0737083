"""In which dtype a file's model computes: what ComfyUI itself would choose for it here (0.33).

ComfyUI asks the model's class and the card: Qwen-Image, for example, is not safe in fp16, so cards
without bf16 compute it in fp32. Here its own functions decide, on the model that the file stands
for: names and shapes, without the weights. Imports happen when called.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .assemble import Assembler, assemble
from .config import SVDQuantConfig
from .dialects import Checkpoint
from .segments import FILE_DTYPES, WithBias
from .weight import Facts, QuantWeight, Segment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALVES = (torch.bfloat16, torch.float16)
_MAX_VALUES = 65536  # a vector of up to so many elements is read: detection looks into norms


@dataclass(frozen=True)
class Dtypes:
    """storage: of scales, low-rank branches and dense weights in memory, and what ComfyUI is told;
    compute: of activations and matmuls."""

    storage: torch.dtype
    compute: torch.dtype


def pick_dtypes(checkpoint: Checkpoint, config: SVDQuantConfig, device: torch.device) -> Dtypes:
    """As the widget says, else as ComfyUI would load the same model from a 16-bit file."""
    import comfy.model_management
    import comfy.utils
    from comfy import model_detection

    file_dtype = FILE_DTYPES[checkpoint.dtype]
    state = outline(checkpoint)
    model_config = model_detection.model_config_from_unet(state, "")
    if model_config is None:  # the load says so in a sentence
        return Dtypes(file_dtype, file_dtype)
    supported = list(model_config.supported_inference_dtypes)

    def computes(dtype: torch.dtype) -> torch.dtype:
        cast = comfy.model_management.unet_manual_cast(dtype, device, supported)
        model_config.set_inference_dtype(dtype, cast, device=device)
        return model_config.manual_cast_dtype or model_config.unet_config["dtype"]

    if config.dtype == "auto":
        num_parameters = comfy.utils.calculate_parameters(state)
        asked = comfy.model_management.unet_dtype(
            model_params=num_parameters, supported_dtypes=supported, weight_dtype=file_dtype
        )
    else:
        asked = DTYPES[config.dtype]
    compute = computes(asked)
    if config.dtype == "fp32" or compute not in (*HALVES, torch.float32):
        return Dtypes(torch.float32, computes(torch.float32))
    # 16 bits in memory wherever ComfyUI computes alike with them
    fitting = (compute, file_dtype, *HALVES) if compute in HALVES else (file_dtype, *HALVES)
    storage = next((d for d in fitting if computes(d) == compute), torch.float32)
    return Dtypes(storage, compute)


def outline(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's tensors under ComfyUI's names, on the meta device; vectors with values."""
    return {
        name: _meta(*value.shape) if isinstance(value, QuantWeight) else value
        for name, value in assemble(checkpoint, torch.float32, _Outliner)
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
    return torch.empty(*shape, device="meta")
