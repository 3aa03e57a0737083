"""Time every attention kernel that is installed, on the shapes of Flux, Wan and SDXL; needs a GPU.

    python bench attention_kernels [--out FOLDER] [--repeats 20] [--resume] [--seconds S]

Milliseconds (median, CUDA events, warmed), peak extra MB and relative L1 error against fp32 rows,
on random bf16 tensors laid out as models make them. A kernel that cannot take a shape is listed
with its reason, one that breaks with its error; each shape has a process of its own, and another
one behind a kernel that took it down. --resume keeps what FOLDER holds from the same GPU, versions
and commit. Without a GPU the page says "unverified" and names this command.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
from .children import command, last_line, write_text
from .environment import environment, same_machine
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
REHEARSED = {"tiny": (1, 2, 256, 256, 128), "tiny, text": (2, 2, 130, 77, 64)}
MARK = "kernel: "
LOST = "CUDA error"  # torch's words for a device that this process can no longer use
_NUM_ERROR_ROWS = 256
_WARMUPS = 3

Json = dict[str, Any]


def make_inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded q, k, v [B, H, N, D] in bf16, views of [B, N, H*D]."""
    batch, heads, q_tokens, k_tokens, head_dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def make(tokens: int) -> Tensor:
        size = (batch, tokens, heads, head_dim)
        flat = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return flat.transpose(1, 2)

    return make(q_tokens), make(k_tokens), make(k_tokens)


def measure_kernel(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Json:
    """One row of the table, on the GPU that holds the tensors."""
    out = kernel.run(q, k, v)
    for _ in range(_WARMUPS - 1):
        out = kernel.run(q, k, v)
    assert isinstance(out, Tensor)
    rows = evenly_spaced_rows(q.shape[2], _NUM_ERROR_ROWS, q.device)
    reference = reference_rows(q, k, v, mask=None, scale=None, rows=rows)
    rel_l1, cosine, finite = compare(out[:, :, rows], reference)
    del out, reference
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


def measure_shape(shape: tuple[int, ...], known: set[str], repeats: int) -> Iterator[Json]:
    """What there is to say of each kernel that is not `known`: first its id, then its row."""
    q, k, v = make_inputs(shape, torch.device("cuda"))
    request = request_of(read_call(q, k, v, shape[1], skip_reshape=True))
    for kernel in KERNELS.values():
        if kernel.id in known:
            continue
        reason = registry.reason_against(kernel, request)
        if reason is not None:
            yield {"id": kernel.id, "not_measured": reason}
            continue
        yield {"id": kernel.id}
        try:
            row = measure_kernel(kernel, q, k, v, repeats)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            yield {"id": kernel.id, "failed": f"{type(error).__name__}: {said}"}
            if LOST in said:
                raise
            torch.cuda.empty_cache()
        else:
            yield row


def child(name: str, known: set[str], options: argparse.Namespace) -> int:
    """The inner process: a line of JSON for everything that measure_shape says."""
    shape = (REHEARSED if options.rehearse else SHAPES)[name]
    for said in measure_shape(shape, known, options.repeats):
        print(MARK + json.dumps(said), flush=True)
    return 0


def empty_shape(name: str, shape: tuple[int, ...]) -> Json:
    sizes = dict(zip(SIZES, shape, strict=True))
    return {"name": name, **sizes, "kernels": [], "not_measured": {}, "failed": {}}


def known_of(part: Json) -> set[str]:
    """Ids of the kernels that the part has an answer for."""
    return {row["id"] for row in part["kernels"]} | {*part["not_measured"], *part["failed"]}


def fill(part: Json, options: argparse.Namespace, ends: float) -> bool:
    """Ask processes until every kernel has an answer. False: the time was up before."""
    while left := KERNELS.keys() - known_of(part):
        if time.monotonic() > ends:
            return False
        asked, error = _ask(part, options, ends)
        if time.monotonic() > ends:
            return False
        if asked is not None:  # it went down with this kernel
            part["failed"][asked] = error or "its process ended without a word"
        elif left == KERNELS.keys() - known_of(part):
            raise RuntimeError(f"{part['name']}: nothing was measured: {error}")
        part["kernels"].sort(key=lambda row: row["ms"])
    return True


def _ask(part: Json, options: argparse.Namespace, ends: float) -> tuple[str | None, str]:
    """One process's answers into `part`; (the kernel it had begun when it ended, its last line)."""
    arguments = ["--child", part["name"], "--known", ",".join(sorted(known_of(part)))]
    arguments += ["--repeats", str(options.repeats), *(["--rehearse"] if options.rehearse else [])]
    asked: str | None = None
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command("attention_kernels", *arguments),
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    asked = _add(part, json.loads(line[len(MARK) :]))
                if time.monotonic() > ends:
                    break
            else:
                process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        return asked, last_line(errors.read())


def _add(part: Json, said: Json) -> str | None:
    """The id of a kernel that has begun; None once `part` has its answer."""
    for key in ("not_measured", "failed"):
        if key in said:
            part[key][said["id"]] = said[key]
            return None
    if "ms" in said:
        part["kernels"].append(said)
        return None
    return str(said["id"])


def save(found: Json, folder: Path) -> None:
    """attention.json and attention.md."""
    write_text(folder / "attention.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "attention.md", tables.attention_page(found))


def kept(folder: Path, found: Json) -> list[Json]:
    """The shapes that an earlier run measured on the same GPU with the same versions."""
    path = folder / "attention.json"
    if not path.is_file():
        return []
    before = json.loads(path.read_text("utf-8"))
    if not same_machine(before, found):
        return []
    return [part for part in before["shapes"] if "failed" in part]


def main() -> int:
    from tqdm import tqdm

    options = _options()
    if options.child:
        return child(options.child, set(options.known.split(",")), options)
    shapes = REHEARSED if options.rehearse else SHAPES
    found: Json = {
        "schema": 2,
        "command": "python bench attention_kernels --out docs/benchmarks",
        "environment": environment(),
        **({"rehearsal": True} if options.rehearse else {}),
        "shapes": [],
    }
    finished = True
    if torch.cuda.is_available():
        ends = time.monotonic() + options.seconds
        before = {part["name"]: part for part in kept(options.out, found) if options.resume}
        with tqdm(total=len(shapes)) as bar:
            for name, shape in shapes.items():
                bar.set_description(name)
                found["shapes"].append(before.get(name) or empty_shape(name, shape))
                finished = fill(found["shapes"][-1], options, ends) and finished
                save(found, options.out)
                bar.update()
    save(found, options.out)
    print(tables.attention_page(found))
    if not finished:
        print(f"Not finished in {options.seconds:.0f} s: --resume goes on", file=sys.stderr)
    return 0 if finished else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="keep what FOLDER holds already")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after these")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--known", default="", help=argparse.SUPPRESS)
    return parser.parse_args()
