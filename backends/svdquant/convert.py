"""Writes an SVDQuant file from a 16-bit one, layer by layer, in Nunchaku's dialect.

One layer is in memory at a time. The target's header is planned from the source's header, tensors
follow in order, and the file appears under its name only when it is complete: an interrupted
conversion leaves nothing behind and is simply started again.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import layouts
from .config import ConvertConfig
from .errors import CheckpointError
from .families import Family
from .file_layers import AWQ_SUFFIXES, SUFFIXES
from .header import DTYPE_BYTES, Header, read_header
from .metadata import metadata
from .plan import Copy, Job, Plan, Spec, Target, plan_conversion, target_tensors
from .quantize import Quantised, quantise, round_awq
from .smoothing import choose_smooth
from .statistics import LayerInputs, Statistics

Progress = Callable[[int, int], None]
DTYPE = torch.bfloat16
Tensors = dict[str, torch.Tensor]


def convert(
    source: Path,
    target: Path,
    config: ConvertConfig,
    *,
    statistics: Statistics | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantise `source` to `target`, which must not exist unless `overwrite`. Returns `target`.

    statistics: recorded inputs for smoothing, None for none; device: where a layer is computed;
    progress(done, total) is called after every layer and may raise to stop.
    Raises CheckpointError if the source cannot be converted or the statistics do not fit.
    """
    if target.exists() and not overwrite:
        raise ValueError(f"{target.name} exists already: choose another file name")
    header = read_header(source)
    plan = plan_conversion(header)
    if statistics is not None:
        _check_statistics(plan, statistics)
    specs = target_tensors(plan, config)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as file:
            file.write(_header_bytes(specs, metadata(plan, header, config)))
            steps = _Converter(header, plan, config, statistics, device or torch.device("cpu"))
            _write_all(file, steps.run(), specs, len(plan.jobs), progress)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _write_all(
    file: BinaryIO,
    steps: Iterator[tuple[bool, Tensors]],
    specs: dict[str, Spec],
    total: int,
    progress: Progress | None,
) -> None:
    names, done = iter(specs), 0
    for is_job, tensors in steps:
        for name, tensor in tensors.items():
            assert name == next(names)
            assert tuple(tensor.shape) == specs[name][1]
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            assert raw.numel() == DTYPE_BYTES[specs[name][0]] * tensor.numel()
            file.write(raw.numpy().data)
        done += is_job
        if is_job and progress is not None:
            progress(done, total)
    assert next(names, None) is None


def _header_bytes(specs: dict[str, Spec], texts: dict[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": texts}
    at = 0
    for name, (dtype, shape) in specs.items():
        num_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        fields[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + num_bytes],
        }
        at += num_bytes
    text = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _check_statistics(plan: Plan, statistics: Statistics) -> None:
    for job in plan.jobs:
        if job.chunks:
            continue
        inputs = statistics.layers.get(job.sources[0])
        if inputs is None:
            raise CheckpointError(
                f"The calibration statistics lack layer {job.sources[0]}: they were recorded on "
                f"another model ({statistics.model}). Calibrate this one."
            )
        if inputs.absmax.shape[0] != job.num_columns:
            raise CheckpointError(
                f"The calibration statistics of {job.sources[0]} have {inputs.absmax.shape[0]} "
                f"channels, the layer has {job.num_columns}: they are of another model."
            )


class _Converter:
    def __init__(
        self,
        header: Header,
        plan: Plan,
        config: ConvertConfig,
        statistics: Statistics | None,
        device: torch.device,
    ):
        self.header, self.plan, self.config = header, plan, config
        self.statistics, self.device = statistics, device

    def run(self) -> Iterator[tuple[bool, Tensors]]:
        """(whether it was a job, its tensors by name) in the plan's order."""
        from safetensors import safe_open

        with safe_open(str(self.header.path), framework="pt") as file:
            for job in self.plan.jobs:
                yield True, self.job(file, job)
            for copy in self.plan.copies:
                yield False, {copy.target: self.copy(file, copy)}

    def copy(self, file: Any, copy: Copy) -> torch.Tensor:
        tensor = file.get_tensor(self.plan.prefix + copy.source)
        if copy.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return self.finite(copy.source, tensor).to(DTYPE)

    def finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.header.path.name}: {name} contains NaN or infinity")
        return tensor

    def read(self, file: Any, job: Job, kind: str) -> torch.Tensor:
        names = [f"{name}.{kind}" for name in job.sources]
        stacked = torch.cat([file.get_tensor(self.plan.prefix + name) for name in names])
        return self.finite(names[0], stacked).to(self.device, torch.float32)

    def job(self, file: Any, job: Job) -> Tensors:
        weight = self.read(file, job, "weight")
        bias = self.read(file, job, "bias") if job.has_bias else None
        if job.chunks:
            return _modulation(job.targets[0], job.chunks, weight, bias)
        tensors: Tensors = {}
        shared: torch.Tensor | None = None  # targets that read the same input smooth it alike
        for target in job.targets:
            part = weight[:, target.columns]
            if shared is None or target.columns != job.targets[0].columns:
                shared = self.smooth(job, target, part)
            tensors |= self.layer(target, part[target.rows].contiguous(), bias, shared)
        return tensors

    def smooth(self, job: Job, target: Target, weight: torch.Tensor) -> torch.Tensor | None:
        if self.statistics is None:
            return None
        inputs: LayerInputs = self.statistics.layers[job.sources[0]]
        return choose_smooth(
            weight,
            inputs.absmax[target.columns].to(self.device),
            inputs.rows[:, target.columns].to(self.device, torch.float32),
            rank=self.config.rank,
            precision=self.config.precision,
            unsigned=target.unsigned and self.config.precision == "int4",
        )

    def layer(
        self,
        target: Target,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        smooth: torch.Tensor | None,
    ) -> Tensors:
        config = self.config
        quantised = quantise(
            weight,
            rank=config.rank,
            precision=config.precision,
            smooth=smooth,
            search=config.search,
            dtype=DTYPE,
        )
        if bias is not None:
            bias = bias[target.rows] if target.owns_bias else torch.zeros_like(bias[target.rows])
            if target.unsigned and config.precision == "int4":
                bias = bias - unsigned_offset(quantised)
        return packed_layer(target.name, quantised, bias, self.plan.family)


def unsigned_offset(quantised: Quantised) -> torch.Tensor:
    """[N] that the shifted input of an unsigned layer adds to its output."""
    unsmoothed = quantised.codes.dense() / quantised.smooth.float()
    return unsmoothed.sum(1) * layouts.UNSIGNED_SHIFT


def packed_layer(
    name: str, quantised: Quantised, bias: torch.Tensor | None, family: Family
) -> Tensors:
    """The tensors of one layer in file order, by key."""
    codes = quantised.codes
    is_fp4 = codes.scale.element_size() == 1
    smooth = layouts.vector_to_file(quantised.smooth.to(DTYPE))
    scale = codes.scale.view(torch.uint8).t().contiguous() if is_fp4 else codes.scale.t()
    parts = {
        "q": layouts.weight_to_file(layouts.plain_from_codes(codes.codes)),
        "scale": layouts.fp8_scales_to_file(scale)
        if is_fp4
        else layouts.scales_to_file(scale.to(DTYPE)),
        "smooth": smooth,
        "smooth_orig": smooth,
        "down": layouts.down_to_file(quantised.down.to(DTYPE)),
        "up": layouts.up_to_file(quantised.up.to(DTYPE)),
    }
    if is_fp4 and family.scales_rows(name):
        rows = torch.full((codes.codes.shape[0],), codes.tensor, dtype=torch.float32)
        parts["rows"] = layouts.vector_to_file(rows.to(DTYPE))
    elif is_fp4:
        parts["tensor"] = torch.tensor([codes.tensor], dtype=torch.float32)
    if bias is not None:
        parts["bias"] = layouts.vector_to_file(bias.to(DTYPE))
    suffixes = SUFFIXES[family.dialect]
    return {f"{name}.{suffixes[part]}": tensor for part, tensor in parts.items()}


def _modulation(
    target: Target, chunks: int, weight: torch.Tensor, bias: torch.Tensor | None
) -> Tensors:
    """A modulation layer: rows interleaved, 1 added to the scales (chunks 1 and n - 2)."""
    codes, scale, zeros = round_awq(layouts.interleave(weight, chunks), DTYPE)
    parts = {
        "q": layouts.awq_to_file(layouts.plain_from_codes(codes)),
        "scale": scale,
        "zeros": zeros,
    }
    if bias is not None:
        per_chunk = bias.clone().view(chunks, -1)
        for index in {1, chunks - 2}:
            per_chunk[index] += 1
        parts["bias"] = layouts.interleave(per_chunk.reshape(-1), chunks).to(DTYPE)
    return {f"{target.name}.{AWQ_SUFFIXES[part]}": tensor for part, tensor in parts.items()}
