"""One quantised layer of a file as a Segment in plain order, its values checked."""

import logging
from dataclasses import replace
from typing import Any

import torch

from . import layouts
from .casts import narrowed
from .dialects import Checkpoint
from .errors import CheckpointError
from .families import Block
from .file_layers import KITCHEN, N1, N2, FileLayer
from .weight import PARTS, Facts, Segment

log = logging.getLogger("slipstream")
CPU = torch.device("cpu")

FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}  # of Checkpoint.dtype
_EMPTY_RANK = 16  # kernels want a low-rank branch: a layer without one gets zeros

WithBias = tuple[Segment, "torch.Tensor | None"]


class SegmentReader:
    """Reads tensors of an open safetensors file into CPU memory; 16-bit ones are cast to `dtype`.

    device: where quantised layers are unpacked, one at a time; when a GPU has no memory left for
    one, it and all after it are unpacked on the CPU.
    Raises CheckpointError for values that no model has: NaN, infinity, smoothing by zero.
    """

    def __init__(
        self, checkpoint: Checkpoint, file: Any, dtype: torch.dtype, device: torch.device = CPU
    ):
        self.checkpoint, self.file, self.dtype, self.device = checkpoint, file, dtype, device

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is not quantised, by its name without prefix."""
        tensor = self.file.get_tensor(self.checkpoint.dense[name])
        owner, _, kind = name.rpartition(".")
        of_core = kind != "bias" and owner in self.checkpoint.core_layers
        if of_core or not tensor.is_floating_point():
            return tensor
        if not _finite(tensor):
            raise self.bad(name, "contains NaN or infinite values")
        if self.checkpoint.family.keeps_dtype:
            return tensor
        return narrowed(tensor, self.dtype)

    def segment(self, layer: FileLayer, *, unsigned: bool, chunks: int) -> WithBias:
        """The whole layer and its bias. unsigned: by topology, if the file does not say it;
        chunks: of a modulation layer, whose rows and bias come in ComfyUI's order."""
        if self.device.type != "cpu":
            try:
                return _on_cpu(self._segment(layer, unsigned=unsigned, chunks=chunks))
            except torch.cuda.OutOfMemoryError:
                log.info("SVDQuant: no GPU memory is left to unpack in, the CPU goes on")
                self.device = CPU
        return self._segment(layer, unsigned=unsigned, chunks=chunks)

    def _segment(self, layer: FileLayer, *, unsigned: bool, chunks: int) -> WithBias:
        is_native = self.checkpoint.dialect == KITCHEN
        if layer.precision == "awq":
            # only Nunchaku's own files interleave modulation rows and add 1 to the scales
            own = self.checkpoint.dialect in (N1, N2)
            return self._awq(layer, is_native, chunks if own else 0)
        shifted = unsigned if layer.unsigned is None else layer.unsigned
        facts = Facts(
            layer.precision,
            row=0,
            num_rows=layer.num_rows,
            column=0,
            num_columns=layer.num_columns,
            unsigned=shifted and layer.precision == "int4",
        )
        return self._kitchen(layer, facts) if is_native else self._nunchaku(layer, facts)

    def bad(self, name: str, what: str) -> CheckpointError:
        file = self.checkpoint.header.path.name
        return CheckpointError(f"{file}: {name} {what}. The file is damaged: download it again.")

    def _part(self, layer: FileLayer, part: str) -> torch.Tensor:
        tensor = self.file.get_tensor(layer.parts[part]).to(self.device)
        if tensor.is_floating_point() and not _finite(tensor):
            raise self.bad(layer.name, f"has NaN or infinite values in {layer.parts[part]}")
        return tensor

    def _smooth(self, layer: FileLayer, smooth: torch.Tensor) -> torch.Tensor:
        smooth = narrowed(smooth, self.dtype)
        if bool((smooth == 0).any()):
            raise self.bad(layer.name, "has zeros among its smoothing factors")
        return smooth

    def _bias(self, layer: FileLayer, *, packed: bool) -> torch.Tensor | None:
        if "bias" not in layer.parts:
            return None
        bias = self._part(layer, "bias")
        bias = layouts.vector_from_file(bias) if packed else bias
        return narrowed(bias, self.dtype)

    def _nunchaku(self, layer: FileLayer, facts: Facts) -> WithBias:
        q = layouts.weight_from_file(self._part(layer, "q").view(torch.int8))
        scale, rows = self._part(layer, "scale"), None
        if layer.precision == "nvfp4":
            q = layouts.swap_nibbles(q)
            plain = layouts.fp8_scales_from_file(scale).view(torch.uint8).t()
            scale = layouts.blocked_from_plain(plain)
            rows = self._row_factors(layer)
        else:
            scale = narrowed(layouts.scales_from_file(scale), self.dtype)
        if layer.rank:
            down = narrowed(layouts.down_from_file(self._part(layer, "down")), self.dtype)
            up = narrowed(layouts.up_from_file(self._part(layer, "up")), self.dtype)
        else:
            down = q.new_zeros(layer.num_columns, _EMPTY_RANK, dtype=self.dtype)
            up = q.new_zeros(layer.num_rows, _EMPTY_RANK, dtype=self.dtype)
        smooth = self._smooth(layer, layouts.vector_from_file(self._part(layer, "smooth")))
        return Segment(facts, q, scale, smooth, down, up, rows), self._bias(layer, packed=True)

    def _row_factors(self, layer: FileLayer) -> torch.Tensor:
        """wtscale times wcscales per row, fp32; what the file lacks counts as 1."""
        rows = torch.ones(layer.num_rows, device=self.device)
        if "rows" in layer.parts:
            rows = layouts.vector_from_file(self._part(layer, "rows").float())
        if "tensor" in layer.parts:
            rows = rows * self._part(layer, "tensor").float().reshape(())
        return rows

    def _kitchen(self, layer: FileLayer, facts: Facts) -> WithBias:
        q, scale, up = (self._part(layer, part) for part in ("q", "scale", "up"))
        if q.dim() == 4:
            q, scale = layouts.weight_from_tiles(q), layouts.scales_from_tiles(scale)
        if up.dim() == 3:
            up = layouts.up_from_tiles(up)
        smooth = self._smooth(layer, self._part(layer, "smooth"))
        down = self._part(layer, "down")
        if not layer.folded:
            down = down / smooth.unsqueeze(1)
        pad = (0, -down.shape[1] % 16)
        down, up = (torch.nn.functional.pad(narrowed(t, self.dtype), pad) for t in (down, up))
        q, scale = q.view(torch.int8).contiguous(), narrowed(scale, self.dtype).contiguous()
        return Segment(facts, q, scale, smooth, down, up), self._bias(layer, packed=False)

    def _awq(self, layer: FileLayer, is_native: bool, chunks: int) -> WithBias:
        q, scale, zeros = (self._part(layer, part) for part in ("q", "scale", "zeros"))
        bias = self._bias(layer, packed=False)
        if not is_native:
            groups, repeats = layer.num_columns // layer.group, layer.group // layouts.GROUP["awq"]
            q = layouts.awq_from_file(q.view(torch.int32))
            scale, zeros = (t[:groups].repeat_interleave(repeats, 0) for t in (scale, zeros))
            # comfy-kitchen's rule is (code - 8) * scale + zeros, the file's code * scale + zeros
            zeros = zeros.float() + 8 * scale.float()
        if chunks:
            if layer.num_rows % chunks:
                raise self.bad(layer.name, f"has {layer.num_rows} rows, not {chunks} equal parts")
            q, bias = layouts.deinterleave(q, chunks), _modulation_bias(bias, chunks)
            scale, zeros = (layouts.deinterleave(t.t(), chunks).t() for t in (scale, zeros))
        facts = Facts("awq", 0, layer.num_rows, 0, layer.num_columns)
        scale, zeros = (narrowed(t, self.dtype).contiguous() for t in (scale, zeros))
        return Segment(facts, q.view(torch.int8), scale, zeros=zeros), bias


def _modulation_bias(bias: torch.Tensor | None, chunks: int) -> torch.Tensor | None:
    """Rows in ComfyUI's order, and without the 1 that the file added to the scales."""
    if bias is None:
        return None
    parts = layouts.deinterleave(bias.float(), chunks).view(chunks, -1)
    for index in {1, chunks - 2}:
        parts[index] -= 1
    return parts.reshape(-1).to(bias.dtype)


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:  # float8_e4m3fn: seven ones are NaN, there is no infinity
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _on_cpu(read: WithBias) -> WithBias:
    segment, bias = read
    parts = {part: getattr(segment, part) for part in PARTS}
    moved = {part: tensor.cpu() for part, tensor in parts.items() if tensor is not None}
    return replace(segment, **moved), None if bias is None else bias.cpu()


def unsigned_by_topology(checkpoint: Checkpoint) -> dict[str, bool]:
    """Layer name -> whether its input is shifted, as the reader will decide it."""
    found = {}
    for name, layer in checkpoint.layers.items():
        stated = layer.unsigned
        if stated is None:
            stated = any(_is_unsigned(block, name) for block in checkpoint.family.blocks)
        found[name] = stated and layer.precision == "int4"
    return found


def _is_unsigned(block: Block, name: str) -> bool:
    place = block.in_source(name)
    pieces = (p for layer in block.layers for row in layer.choices[0] for p in row)
    return place is not None and any(p.unsigned and p.name == place[1] for p in pieces)
