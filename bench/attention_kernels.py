"""Time every attention kernel that is installed, on the shapes of Flux, Wan and SDXL; needs a GPU.

    python bench attention_kernels [--out FOLDER] [--repeats 20]

Milliseconds (median, CUDA events, warmed), peak extra MB and relative L1 error against fp32 rows,
on random bf16 tensors laid out as models make them. A kernel that cannot take a shape is listed
with its reason. Without a GPU the page says "unverified" and names this command.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.attention.kernels.base import Kernel
from ..backends.attention.kernels.table import KERNELS
from ..backends.attention.layout import read_call, request_of
from ..backends.attention.reference import compare, evenly_spaced_rows, reference_rows
from . import tables
from .environment import environment
from .setup_env import PACK_ROOT

OUTPUT = PACK_ROOT / "output" / "bench"
SIZES = ("batch", "heads", "q_tokens", "k_tokens", "head_dim")
SHAPES = {
    "Flux, 1024 x 1024": (1, 24, 4608, 4608, 128),
    "Wan, 480p, 81 frames": (1, 40, 32_760, 32_760, 128),
    "Wan, 480p, text": (1, 40, 32_760, 512, 128),
    "SDXL, 1024 x 1024, 64 x 64 tokens": (2, 10, 4096, 4096, 64),
    "SDXL, 1024 x 1024, 32 x 32 tokens": (2, 20, 1024, 1024, 64),
    "SDXL, 1024 x 1024, text": (2, 10, 4096, 77, 64),
}
_NUM_ERROR_ROWS = 256
_WARMUPS = 3


def make_inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded q, k, v [B, H, N, D] in bf16, views of [B, N, H*D]."""
    batch, heads, q_tokens, k_tokens, head_dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def make(tokens: int) -> Tensor:
        size = (batch, tokens, heads, head_dim)
        flat = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return flat.transpose(1, 2)

    return make(q_tokens), make(k_tokens), make(k_tokens)


def measure_kernel(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, Any]:
    """One row of the table, on the GPU that holds the tensors."""
    for _ in range(_WARMUPS):
        out = kernel.run(q, k, v)
    assert isinstance(out, Tensor)
    rows = evenly_spaced_rows(q.shape[2], _NUM_ERROR_ROWS, q.device)
    rel_l1, cosine, finite = compare(out[:, :, rows], reference_rows(q, k, v, rows=rows))
    del out
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.run(q, k, v)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {
        "id": kernel.id,
        "category": kernel.category,
        "ms": round(statistics.median(times), 4),
        "ms_quartiles": [round(low, 4), round(high, 4)],
        "peak_mb": round((torch.cuda.max_memory_allocated() - held) / 1e6, 1),
        "rel_l1": float(f"{rel_l1:.4g}"),
        "cosine": float(f"{cosine:.6g}"),
        "finite": finite,
    }


def measure_shape(name: str, shape: tuple[int, ...], repeats: int, bar: Any) -> dict[str, Any]:
    """All kernels on one shape, fastest first."""
    q, k, v = make_inputs(shape, torch.device("cuda"))
    request = request_of(read_call(q, k, v, shape[1], skip_reshape=True))
    measured, absent = [], {}
    for kernel in KERNELS.values():
        bar.set_description(f"{name}: {kernel.id}")
        reason = registry.reason_against(kernel, request)
        if reason is None:
            try:
                measured.append(measure_kernel(kernel, q, k, v, repeats))
            except RuntimeError as error:  # out of memory, or a package that cannot run here
                reason = str(error).strip().splitlines()[0]
        if reason is not None:
            absent[kernel.id] = reason
        bar.update()
    measured.sort(key=lambda row: row["ms"])
    sizes = dict(zip(SIZES, shape, strict=True))
    return {"name": name, **sizes, "kernels": measured, "not_measured": absent}


def save(found: dict[str, Any], folder: Path) -> None:
    """attention.json and attention.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "attention.json").write_text(text, encoding="utf-8")
    (folder / "attention.md").write_text(tables.attention_page(found), encoding="utf-8")


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "schema": 1,
        "command": "python bench attention_kernels --out docs/benchmarks",
        "environment": environment(),
        "shapes": [],
    }
    if torch.cuda.is_available():
        with tqdm(total=len(SHAPES) * len(KERNELS)) as bar:
            for name, shape in SHAPES.items():
                found["shapes"].append(measure_shape(name, shape, options.repeats, bar))
                save(found, options.out)
    save(found, options.out)
    print(tables.attention_page(found))
    return 0
