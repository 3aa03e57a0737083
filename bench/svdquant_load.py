"""How long SVDQuant Loader takes for a Qwen-Image file, and what memory it keeps to itself.

    python bench svdquant_load [--blocks 60] [--threads 2] [--cases off,first,second]
                               [--folder FOLDER] [--out docs/benchmarks]

Writes a file of full width (rank 128, random codes; 60 blocks are the whole model, 12 GB) and loads
it through the real loader up to the MODEL, each time in a fresh process: without an unpacked copy,
the first time (which makes the copy), and the second. Needs twice the file's size on the disk.
"""

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..backends.svdquant import host_cache
from ..backends.svdquant.host import load_svdquant
from ..backends.svdquant.host_patcher import quantised_layers
from . import children
from .environment import environment
from .in_process import use_comfyui
from .setup_env import PACK_ROOT
from .svdquant_pages import load_page

WIDTH, HEAD, RANK, TEXT = 3072, 128, 128, 3584
LINEARS = {  # of a block, in Nunchaku's names -> rows, columns
    "attn.to_qkv": (3 * WIDTH, WIDTH),
    "attn.add_qkv_proj": (3 * WIDTH, WIDTH),
    "attn.to_out.0": (WIDTH, WIDTH),
    "attn.to_add_out": (WIDTH, WIDTH),
    "img_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "img_mlp.net.2": (WIDTH, 4 * WIDTH),
    "txt_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "txt_mlp.net.2": (WIDTH, 4 * WIDTH),
}
OUTSIDE = {
    "img_in": (WIDTH, 64),
    "txt_in": (WIDTH, TEXT),
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
    "proj_out": (64, WIDTH),
}
GOALS = {"first": 30, "second": 5}  # seconds for 60 blocks on two cores
GOAL_PRIVATE = 0.1  # of the file
CASES = ("off", "first", "second")


def entries(num_blocks: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the file."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns) in OUTSIDE.items():
        found |= {f"{name}.weight": ("BF16", (rows, columns)), f"{name}.bias": ("BF16", (rows,))}
    found["txt_norm.weight"] = ("BF16", (TEXT,))
    for index in range(num_blocks):
        block = f"transformer_blocks.{index}."
        for name, (rows, columns) in LINEARS.items():
            found |= {
                f"{block}{name}.qweight": ("I8", (rows, columns // 2)),
                f"{block}{name}.wscales": ("BF16", (columns // 64, rows)),
                f"{block}{name}.smooth_factor": ("BF16", (columns,)),
                f"{block}{name}.smooth_factor_orig": ("BF16", (columns,)),
                f"{block}{name}.proj_down": ("BF16", (columns, RANK)),
                f"{block}{name}.proj_up": ("BF16", (rows, RANK)),
                f"{block}{name}.bias": ("BF16", (rows,)),
            }
        for name in ("img_mod.1", "txt_mod.1"):
            rows = 6 * WIDTH
            found |= {
                f"{block}{name}.qweight": ("I32", (rows // 4, WIDTH // 2)),
                f"{block}{name}.wscales": ("BF16", (WIDTH // 64, rows)),
                f"{block}{name}.wzeros": ("BF16", (WIDTH // 64, rows)),
                f"{block}{name}.bias": ("BF16", (rows,)),
            }
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            found[f"{block}attn.{name}.weight"] = ("BF16", (HEAD,))
    return found


def write_file(path: Path, num_blocks: int) -> None:
    """The file; equal bytes in every block, since none of the paths looks at their values."""
    sizes = {"I8": 1, "BF16": 2, "I32": 4}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in entries(num_blocks).items():
        start, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    codes = os.urandom(1 << 26)
    values = torch.empty(1 << 25, dtype=torch.bfloat16).normal_(1, 0.1)
    halves = values.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            start, end = entry["data_offsets"]
            file.write((halves if entry["dtype"] == "BF16" else codes)[: end - start])
        file.flush()
        os.fsync(file.fileno())  # a user's file lies on the disk; writing it is not the load's time


def private_bytes() -> int:
    """Memory of this process that no file backs: what cannot be dropped and read again."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def load_once(path: Path, folder: Path, *, keep_unpacked: bool, threads: int) -> dict[str, Any]:
    """Load in this process: seconds, processor seconds, private memory, and a pass over all."""
    torch.set_num_threads(threads)
    use_comfyui()
    import comfy.sd  # noqa: F401 - not the loader's time: a running ComfyUI has imported it
    import folder_paths

    folder_paths.add_model_folder_path(host_cache.FOLDER, str(folder))
    before = private_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    model = load_svdquant(str(path), {"keep_unpacked": keep_unpacked})
    found = {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "private_bytes": private_bytes() - before,
    }
    wall = time.perf_counter()
    for module in quantised_layers(model.model).values():
        module.weight._qdata.view(torch.int64).sum()
    found["read_seconds"] = round(time.perf_counter() - wall, 2)
    found["private_bytes_after_use"] = private_bytes() - before
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases on one file, each in a process of its own."""
    path, copies = folder / "svdq-int4_r128-qwen-image.safetensors", folder / "copies"
    write_file(path, options.blocks)
    rows = []
    for case in (case for case in CASES if case in options.cases.split(",")):
        arguments = ["--child", case, "--threads", str(options.threads)]
        said = children.ask("svdquant_load", *arguments, "--folder", str(folder))
        rows.append({"case": case, **said})
        print(json.dumps(rows[-1]), flush=True)
    kept = list(copies.glob("*.safetensors"))
    return {
        "file_bytes": path.stat().st_size,
        "copy_bytes": kept[0].stat().st_size if kept else None,
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the file is written (default: temporary)"
    )
    parser.add_argument("--out", type=Path, default=PACK_ROOT / "output" / "bench")
    parser.add_argument(
        "--cases", default=",".join(CASES), help="off takes as much RAM as the file"
    )
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        print("svdquant_load reads /proc, which only Linux has", file=sys.stderr)
        return 1
    if options.child:
        (path,) = options.folder.glob("*.safetensors")
        keep = options.child != "off"
        found = load_once(
            path, options.folder / "copies", keep_unpacked=keep, threads=options.threads
        )
        children.answer(found)
        return 0
    found = {
        "command": f"python bench svdquant_load --blocks {options.blocks} --threads "
        f"{options.threads} --cases {options.cases} --out docs/benchmarks",
        "num_blocks": options.blocks,
        "goal_seconds": GOALS,
        "goal_private": GOAL_PRIVATE,
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found |= measure(options, Path(folder))
    found["environment"] = environment(cpu=True) | {"threads": options.threads}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "svdquant-load.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "svdquant-load.md").write_text(load_page(found), "utf-8")
    return 0
