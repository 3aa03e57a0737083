"""What a file is and which backends can run it here, as text for a person. Reads the header only.

Numbers come from the tensors; metadata and the file's name are only compared with them.
"""

import re
from collections import Counter
from dataclasses import astuple

import torch

from .dialects import DIALECTS, Checkpoint
from .engine import Engine, request_for
from .kernels import KERNELS, Kernel, LayerRequest
from .notices import expected
from .segments import FILE_DTYPES, unsigned_by_topology
from .technique import size_text
from .variants import variant_lines
from .weight import Facts

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NAME = re.compile(r"svdq-(int4|fp4)_r(\d+)-")


def inspect_text(
    checkpoint: Checkpoint,
    device: torch.device,
    compute: torch.dtype | None = None,
    title: str = "",
) -> str:
    """A few lines: dialect, family, precision, ranks, layers, sizes, doubts, backends.

    compute: what ComfyUI computes the model in on the device; None: the file's own dtype. title:
    what the model is, if the family does not say it.
    """
    compute = compute or FILE_DTYPES[checkpoint.dtype]
    asked = requests(checkpoint, device, compute)
    title = title or checkpoint.family.title
    layers = checkpoint.layers.values()
    entries = checkpoint.header.tensors
    quantised = sum(entries[key].num_bytes for f in layers for key in f.parts.values())
    total = sum(entry.num_bytes for entry in entries.values())
    kinds = Counter(layer.precision for layer in layers)
    ranks = ", ".join(map(str, checkpoint.ranks))
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    kitchen = next(kernel for kernel in KERNELS if kernel.id == "kitchen")
    lines = [
        *expected(kitchen, asked, title),
        f"{' + '.join(p.name for p in checkpoint.header.paths)}: {size_text(total)}",
        f"Family: {title}. Dialect: {DIALECTS[checkpoint.dialect]}.",
        f"Precision: {checkpoint.precision}, rank {ranks}, 16-bit parts {checkpoint.dtype}.",
        f"Quantised layers: {len(layers)} ({shown}), {size_text(quantised)}; "
        f"other tensors: {len(checkpoint.dense)}.",
        *other_parts(checkpoint),
        *variant_lines(checkpoint),
        *doubts(checkpoint),
        f"Computes in {_SHORT.get(compute, str(compute))} here.",
        f"Backends on {_device_name(device)}:",
        *(f"  {kernel.id}: {verdict(kernel, asked)}" for kernel in KERNELS),
        f"  auto picks {picked(asked, device)}.",
    ]
    return "\n".join(lines)


def other_parts(checkpoint: Checkpoint) -> list[str]:
    """What the file holds besides, and who reads it."""
    found = []
    formats = Counter(settings["format"] for settings in checkpoint.core_layers.values())
    if formats:
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items()))
        found.append(f"Layers that ComfyUI computes itself: {shown}.")
    if checkpoint.num_others:
        found.append(
            f"Not read: {checkpoint.num_others} tensors outside the diffusion model (VAE, text "
            "encoders). Load them with their own loaders."
        )
    return found


def doubts(checkpoint: Checkpoint) -> list[str]:
    """Where metadata or the file's name say something else than the tensors."""
    found = []
    config = checkpoint.header.json("quantization_config")
    rank = config.get("rank")
    if isinstance(rank, int) and checkpoint.ranks not in ((rank,), ()):
        found.append(f"Doubt: the metadata says rank {rank}.")
    weight = config.get("weight")
    stated = weight.get("dtype") if isinstance(weight, dict) else None
    fp4 = isinstance(stated, str) and stated.startswith("fp4")
    if isinstance(stated, str) and fp4 != (checkpoint.precision == "nvfp4"):
        found.append(f"Doubt: the metadata says {stated}.")
    match = _NAME.search(checkpoint.header.path.name)
    if match:
        precision = "nvfp4" if match.group(1) == "fp4" else "int4"
        if precision != checkpoint.precision or (int(match.group(2)),) != checkpoint.ranks:
            found.append(f"Doubt: the file's name says {precision}, rank {match.group(2)}.")
    return found


def requests(
    checkpoint: Checkpoint, device: torch.device, compute: torch.dtype
) -> list[LayerRequest]:
    """One request per kind of layer in the file, for a device."""
    unsigned = unsigned_by_topology(checkpoint)
    kinds = {
        Facts(f.precision, 0, f.num_rows, 0, f.num_columns, unsigned[name])
        for name, f in checkpoint.layers.items()
    }
    return [request_for(facts, compute, device) for facts in sorted(kinds, key=astuple)]


def verdict(kernel: Kernel, asked: list[LayerRequest]) -> str:
    """Whether a backend can run these layers, or the reason."""
    reason = kernel.available()
    if reason is not None:
        return f"no ({reason})"
    reasons = [r for r in map(kernel.ineligible, asked) if r is not None]
    if not reasons:
        return "yes"
    if len(reasons) == len(asked):
        return f"no ({reasons[0]})"
    return f"for {len(asked) - len(reasons)} of {len(asked)} kinds of layers ({reasons[0]})"


def picked(asked: list[LayerRequest], device: torch.device) -> str:
    """What auto would use, as far as it is known without loading."""
    if device.type == "cuda":
        return "the fastest of them, measured on one layer when the model is loaded"
    engine = Engine("auto")
    layers = [request for request in asked if request.precision != "awq"]
    return ", ".join(dict.fromkeys(engine.choose(request).id for request in layers))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (SM{major}{minor})"
    return device.type
