"""Speed and memory of 4-bit layers of Flux's widths per backend, beside a 16-bit Linear.

    python bench svdquant_layers [--device cuda] [--rows 256,1024,4096,8192] [--out FOLDER]

Random weights. One line per layer shape, number of rows and backend: milliseconds (median),
TFLOP/s, peak memory of the call, relative error against the 16-bit matmul of the same weights. On
a GPU the natural and the tile-packed storage of comfy-kitchen are both timed. FOLDER gets
svdquant-layers.json and .md; --resume keeps the layers that it holds from the same GPU, versions
and commit.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..backends.svdquant import layouts
from ..backends.svdquant.engine import request_of
from ..backends.svdquant.kernels import KERNELS, Dequant
from ..backends.svdquant.weight import Facts, Segment, effective, whole
from .children import write_text
from .environment import environment, same_machine
from .setup_env import PACK_ROOT
from .svdquant_pages import DENSE, layers_page

SHAPES = {
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp_up": (12288, 3072),
    "mlp_down": (3072, 12288),
}
REHEARSED = {"tiny": (256, 128)}
RANK = 32
ROUNDS = 20

Json = dict[str, Any]


def random_segment(num_rows: int, num_columns: int, precision: str, device: str) -> Segment:
    """A segment with random codes and scales of a plausible size, in bf16."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16().to(device)

    codes = torch.randint(-128, 128, (num_rows, num_columns // 2), dtype=torch.int8)
    ones = torch.ones(num_columns, dtype=torch.bfloat16, device=device)
    down = randn(num_columns, RANK, scale=0.3 / num_columns**0.5)
    up = randn(num_rows, RANK, scale=0.3 / RANK**0.5)
    facts = Facts(precision, 0, num_rows, 0, num_columns)
    step = 0.2 / num_columns**0.5
    if precision == "nvfp4":
        scale = torch.full((num_rows, num_columns // 16), 1.0).to(torch.float8_e4m3fn).to(device)
        rows = torch.full((num_rows,), step, device=device)
        return Segment(facts, codes.view(torch.uint8).to(device), scale, ones, down, up, rows)
    scale = randn(num_columns // 64, num_rows, scale=0.1 * step) + step
    return Segment(facts, codes.to(device), scale, ones, down, up)


def tiled(segment: Segment) -> Callable[[torch.Tensor], torch.Tensor]:
    """comfy-kitchen's GEMM on its tile-packed storage."""
    import comfy_kitchen

    assert segment.up is not None
    weight = layouts.weight_to_tiles(segment.q).contiguous()
    scales, up = layouts.scales_to_tiles(segment.scale), layouts.up_to_tiles(segment.up)

    def run(x: torch.Tensor) -> torch.Tensor:
        codes, steps, low = comfy_kitchen.quantize_svdquant_w4a4(
            x, smooth=segment.smooth, lora_down=segment.down
        )
        return comfy_kitchen.scaled_mm_svdquant_w4a4(
            act=codes, wgt=weight, ascales=steps, wscales=scales, lora_act_in=low, lora_up=up
        )[: x.shape[0]]

    return run


def candidates(
    segment: Segment, device: torch.device
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor] | str]]:
    """(name, call or the reason why not) of a 16-bit Linear and every backend."""
    dense = effective(whole(segment)).bfloat16()
    yield DENSE, lambda x: torch.nn.functional.linear(x, dense)
    request = request_of(segment, device)
    for kernel in KERNELS:
        reason = kernel.available() or kernel.ineligible(request)
        if reason is not None:
            yield kernel.id, reason
            continue
        yield kernel.id, functools.partial(kernel.run, segment=segment)
        if kernel.id == "kitchen" and device.type == "cuda" and segment.rows is None:
            yield "kitchen, tiles", tiled(segment)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of some calls, each with the device idle before and after."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(ROUNDS + 3 if device.type == "cuda" else 3):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[3:] or times)[len(times[3:] or times) // 2] * 1e3


def measure(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, wanted: torch.Tensor
) -> dict[str, float]:
    """ms, peak_bytes (GPU only) and error of one call on x."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    y = call(x)
    found = {"error": float((y.float() - wanted.float()).norm() / wanted.float().norm())}
    if x.is_cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    found["ms"] = milliseconds(lambda: call(x), x.device)
    return found


def lines_of(
    layer: str, shape: tuple[int, int], options: argparse.Namespace, device: torch.device
) -> list[Json]:
    """A line for each number of rows and backend: its figures, or why there are none."""
    num_rows, num_columns = shape
    segment = random_segment(num_rows, num_columns, options.precision, str(device))
    found: list[Json] = []
    for count in map(int, options.rows.split(",")):
        x = torch.randn(count, num_columns, device=device, dtype=torch.bfloat16)
        wanted = Dequant().run(x, segment)
        flops = 2 * count * num_rows * num_columns
        for backend, call in candidates(segment, device):
            line: Json = {"layer": layer, "rows": count, "backend": backend}
            if isinstance(call, str):
                line["reason"] = call
            else:
                try:
                    line |= measure(call, x, wanted)
                    line["tflops"] = flops / line["ms"] / 1e9
                except RuntimeError as error:  # a kernel that breaks is a line too
                    line["reason"] = f"failed: {(str(error).splitlines() or [''])[0]}"
            found.append(line)
            print(said(line), flush=True)
    return found


def said(line: Json) -> str:
    """One line for a person."""
    head = f"{line['layer']:9} M={line['rows']:<6} {line['backend']:15}"
    if "reason" in line:
        return f"{head} {line['reason']}"
    return f"{head} {line['ms']:8.3f} ms {line['tflops']:7.1f} TFLOP/s  error {line['error']:.3f}"


def save(found: Json, folder: Path) -> None:
    """svdquant-layers.json and svdquant-layers.md."""
    write_text(folder / "svdquant-layers.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "svdquant-layers.md", layers_page(found))


def kept(folder: Path, found: Json) -> list[Json]:
    """Lines of an earlier run on this machine; one is saved when its layer is complete."""
    path = folder / "svdquant-layers.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    same = before and same_machine(before, found) and before["precision"] == found["precision"]
    return before["lines"] if same and before["rows"] == found["rows"] else []


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    found: Json = {
        "command": "python bench svdquant_layers --out docs/benchmarks",
        "environment": environment(cpu=device.type == "cpu"),
        **({"rehearsal": True} if options.rehearse else {}),
        "precision": options.precision,
        "rank": RANK,
        "rows": options.rows,
        "lines": [],
    }
    found["lines"] = kept(options.out, found) if options.resume else []
    known = {line["layer"] for line in found["lines"]}
    shapes = REHEARSED if options.rehearse else SHAPES
    print(f"{found['environment']['device']}, {options.precision}, rank {RANK}")
    for layer, shape in shapes.items():
        if layer not in known:
            found["lines"] += lines_of(layer, shape, options, device)
            save(found, options.out)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    parser.add_argument("--rows", default="256,1024,4096,8192" if default == "cuda" else "256")
    parser.add_argument("--out", type=Path, default=PACK_ROOT / "output" / "bench")
    parser.add_argument("--resume", action="store_true", help="keep the layers FOLDER holds")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()
