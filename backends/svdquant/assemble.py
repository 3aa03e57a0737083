"""From a checked file to ComfyUI's tensor names, layer by layer.

`assemble` yields (name, tensor or QuantWeight) so that no more than one layer exists twice. Every
key of the file is used or named in an error; every layer of a block is found or named.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .dialects import Checkpoint
from .errors import CheckpointError
from .families import Block, Family, Grid, Layer, Piece
from .file_layers import LITE
from .header import Header
from .segments import CPU, SegmentReader, WithBias
from .variants import missing_markers
from .weight import QuantWeight, Segment, rows_of, stack_columns, stack_rows, whole

Assembled = tuple[str, "torch.Tensor | QuantWeight"]


def assemble(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    kind: "type[Assembler] | None" = None,
) -> Iterator[Assembled]:
    """All tensors of the model under ComfyUI's names, on the CPU; 16-bit ones cast to `dtype`.

    device: where quantised layers are unpacked; kind: the class that puts them together, where it
    is not Assembler itself.
    Raises CheckpointError for values that no model has (NaN, zero smoothing), for layers that are
    missing and for keys that are left over.
    """
    from safetensors import SafetensorError, safe_open

    header = checkpoint.header
    try:
        with contextlib.ExitStack() as opened:
            files = {
                path: opened.enter_context(safe_open(str(path), framework="pt"))
                for path in header.paths
            }
            yield from (kind or Assembler)(checkpoint, _Files(header, files), dtype, device).run()
    except (SafetensorError, OSError) as error:
        names = " or ".join(path.name for path in header.paths)
        raise CheckpointError(f"{names} cannot be read ({error}): download it again") from error


class _Files:
    """The open files of a model as one."""

    def __init__(self, header: Header, files: dict[Path, Any]):
        self.header, self.files = header, files

    def get_tensor(self, key: str) -> torch.Tensor:
        return self.files[self.header.path_of(key)].get_tensor(key)


class Assembler:
    def __init__(self, checkpoint: Checkpoint, file: Any, dtype: torch.dtype, device: torch.device):
        self.checkpoint = checkpoint
        self.reader = SegmentReader(checkpoint, file, dtype, device)
        self.dtype = dtype
        self.used: set[str] = set()
        self.num_shared = 0
        self.last_read: tuple[str, WithBias] | None = None

    def run(self) -> Iterator[Assembled]:
        checkpoint = self.checkpoint
        yield from self.native() if checkpoint.native else self.diffusers(checkpoint.family)
        for name in missing_markers(checkpoint):
            yield name, torch.empty(0)
        left = sorted({*checkpoint.layers, *checkpoint.dense} - self.used)
        if left:
            raise CheckpointError(
                f"{checkpoint.header.path.name} has {len(left)} keys that "
                f"{checkpoint.family.title} does not have ({', '.join(left[:3])}): it is a variant "
                "that is not supported, and without them the image would be noise."
            )

    def native(self) -> Iterator[Assembled]:
        """Names are ComfyUI's own already."""
        for name in self.checkpoint.layers:
            segment, bias = self.layer(Piece(name=name), 0)
            yield f"{name}.weight", whole(segment)
            if bias is not None:
                yield f"{name}.bias", bias
        for name in self.checkpoint.dense:
            yield name, self.tensor(name)
        for name, settings in self.checkpoint.core_layers.items():
            if f"{name}.comfy_quant" not in self.checkpoint.dense:  # stated in the metadata
                text = json.dumps(settings).encode()
                yield f"{name}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8)

    def diffusers(self, family: Family) -> Iterator[Assembled]:
        for block in family.blocks:
            for index in range(self.num_blocks(block)):
                yield from self.block(block, index)
        if self.checkpoint.dialect == LITE:  # the only one with quantised layers outside blocks
            yield from self.outside(family)
        for name, values in family.constants:
            yield name, torch.tensor(values)
        for name in self.checkpoint.dense:
            target = None if name in self.used else _renamed(name, family)
            if target is not None:
                tensor = self.tensor(name)
                if target.rpartition(".")[0] in family.swapped:
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                yield target, tensor

    def outside(self, family: Family) -> Iterator[Assembled]:
        """Quantised layers outside the blocks, in plain order."""
        for name in self.checkpoint.layers:
            target = None if name in self.used else _renamed(name, family)
            if target is not None and target not in family.swapped:
                segment, bias = self.layer(Piece(name=name), 0)
                yield f"{target}.weight", whole(segment)
                if bias is not None:
                    yield f"{target}.bias", bias

    def num_blocks(self, block: Block) -> int:
        names = (*self.checkpoint.layers, *self.checkpoint.dense)
        found = {place[0] for name in names if (place := block.in_source(name))}
        missing = set(range(max(found, default=-1) + 1)) - found
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.header.path.name} lacks {block.source}.{min(missing)}: "
                "the file is truncated"
            )
        return len(found)

    def block(self, block: Block, index: int) -> Iterator[Assembled]:
        source, target = f"{block.source}.{index}.", f"{block.target}.{index}."
        for layer in block.layers:
            grid, is_quantised = self.choose(layer, source)
            if is_quantised:
                weight, bias = self.quantised(grid, layer.chunks)
                yield f"{target}{layer.target}.weight", weight
                if bias is not None:
                    yield f"{target}{layer.target}.bias", bias
                continue
            for kind in ("weight", "bias"):
                tensor = self.unquantised(grid, kind)
                if tensor is not None:
                    yield f"{target}{layer.target}.{kind}", tensor
        for theirs, ours in block.copies:
            for kind in ("weight", "bias"):
                if f"{source}{theirs}.{kind}" in self.checkpoint.dense:
                    yield f"{target}{ours}.{kind}", self.tensor(f"{source}{theirs}.{kind}")

    def choose(self, layer: Layer, source: str) -> tuple[Grid, bool]:
        """The first choice that the file holds, with full names, and whether it is quantised."""
        layers, dense = self.checkpoint.layers, self.checkpoint.dense
        for choice in layer.choices:
            grid = tuple(tuple(replace(p, name=source + p.name) for p in row) for row in choice)
            names = [piece.name for row in grid for piece in row]
            if all(name in layers for name in names):
                return grid, True
            if all(f"{name}.weight" in dense for name in names):
                return grid, False
        wanted = " + ".join(source + piece.name for row in layer.choices[0] for piece in row)
        raise CheckpointError(
            f"{self.checkpoint.header.path.name}: layer {wanted} is missing: "
            "the file is truncated or in another dialect"
        )

    def quantised(self, grid: Grid, chunks: int) -> tuple[QuantWeight, torch.Tensor | None]:
        """A layer of one piece, of pieces one below the other, or of pieces side by side."""
        parts = [self.layer(piece, chunks) for row in grid for piece in row]
        segments = [segment for segment, _ in parts]
        biases = [bias for _, bias in parts if bias is not None]
        if len(parts) == 1:
            return whole(segments[0]), biases[0] if biases else None
        if len(grid) > 1:
            return stack_rows(segments), torch.cat(biases) if biases else None
        added = sum(bias.float() for bias in biases)
        bias = added.to(self.dtype) if isinstance(added, torch.Tensor) else None
        return stack_columns(segments), bias

    def unquantised(self, grid: Grid, kind: str) -> torch.Tensor | None:
        """The same of a layer that the file keeps in 16 bits; kind: weight or bias."""
        pieces = [piece for row in grid for piece in row]
        if any(f"{piece.name}.{kind}" not in self.checkpoint.dense for piece in pieces):
            return None
        tensors = []
        for piece in pieces:
            index, count = piece.part
            tensors.append(self.tensor(f"{piece.name}.{kind}").chunk(count)[index])
        if len(tensors) == 1:
            return tensors[0].contiguous()
        if len(grid) > 1:
            return torch.cat(tensors)
        return torch.cat(tensors, 1) if kind == "weight" else torch.stack(tensors).sum(0)

    def tensor(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.reader.tensor(name)

    def layer(self, piece: Piece, chunks: int) -> WithBias:
        """A file layer, or some of its rows, as a segment; its bias in plain order."""
        self.used.add(piece.name)
        index, count = piece.part
        segment, bias = self.read(piece, chunks)
        if count == 1:
            return segment, bias
        if segment.facts.num_rows % (count * (128 if segment.rows is not None else 1)):
            what = f"has {segment.facts.num_rows} rows, which do not divide into {count}"
            raise self.reader.bad(piece.name, what)
        size = segment.facts.num_rows // count
        return self.rows(segment, index * size, size, count), (
            None if bias is None else bias[index * size : (index + 1) * size].clone()
        )

    def rows(self, segment: Segment, start: int, size: int, count: int) -> Segment:
        return rows_of(segment, start, start + size, shared=self.num_shared, count=count)

    def read(self, piece: Piece, chunks: int) -> WithBias:
        """The whole file layer; the last one is kept, since its rows are asked for in turn."""
        if self.last_read is None or self.last_read[0] != piece.name:
            layer = self.checkpoint.layers[piece.name]
            read = self.reader.segment(layer, unsigned=piece.unsigned, chunks=chunks)
            self.last_read = (piece.name, read)
            self.num_shared += 1
        return self.last_read[1]


def _renamed(name: str, family: Family) -> str | None:
    """ComfyUI's name of a tensor outside the blocks; None if the family has no such tensor."""
    if any(name.startswith(block.source + ".") for block in family.blocks):
        return None
    for theirs, ours in family.rest:
        if not theirs:
            return name
        if name == theirs or name.startswith(theirs + "."):
            return ours + name[len(theirs) :]
    return None
