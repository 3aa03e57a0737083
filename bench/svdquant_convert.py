"""How long SVDQuant Convert takes for a 12B model, from one block of each kind at full width.

    python bench svdquant_convert [--threads 2] [--rounds 2] [--out docs/benchmarks]

Writes a 16-bit Flux file of random weights with one double and one single block (1 GB) into a
temporary folder, converts it with each setting and multiplies each block's time by Flux's 19 and
38; of several rounds the quickest counts, since other work only adds time. Random weights take as
long as trained ones; how good the result is, svdquant_methods tells.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..backends.svdquant.config import ConvertConfig
from ..backends.svdquant.convert import convert
from ..backends.svdquant.header import read_header
from ..backends.svdquant.plan import plan_conversion
from ..backends.svdquant.statistics import LayerInputs, Statistics
from .environment import environment
from .setup_env import PACK_ROOT
from .svdquant_pages import convert_page

WIDTH, HEAD = 3072, 128
CASES = {  # setting -> (config, whether a calibration is at hand)
    "int4, rank 32": (ConvertConfig(), False),
    "int4, rank 32, calibrated": (ConvertConfig(), True),
    "int4, rank 32, calibrated, search": (ConvertConfig(search=True), True),
    "int4, rank 128, calibrated": (ConvertConfig(rank=128), True),
    "nvfp4, rank 32, calibrated": (ConvertConfig(precision="nvfp4"), True),
}
GOAL_MINUTES = 25  # of the whole model on two cores
BLOCKS = {"double_blocks": 19, "single_blocks": 38}
SHAPES = {
    "img_in": (WIDTH, 64),
    "txt_in": (WIDTH, 4096),
    "time_in.in_layer": (WIDTH, 256),
    "time_in.out_layer": (WIDTH, WIDTH),
    "vector_in.in_layer": (WIDTH, 768),
    "vector_in.out_layer": (WIDTH, WIDTH),
    "guidance_in.in_layer": (WIDTH, 256),
    "guidance_in.out_layer": (WIDTH, WIDTH),
    "final_layer.linear": (64, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    **{
        f"double_blocks.0.{stream}_{layer}": shape
        for stream in ("img", "txt")
        for layer, shape in {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.0": (4 * WIDTH, WIDTH),
            "mlp.2": (WIDTH, 4 * WIDTH),
            "mod.lin": (6 * WIDTH, WIDTH),
        }.items()
    },
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
    "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH),
}
NORMS = (
    *(f"double_blocks.0.{s}_attn.norm.{n}_norm" for s in ("img", "txt") for n in ("query", "key")),
    *(f"single_blocks.0.norm.{n}_norm" for n in ("query", "key")),
)


def write_source(path: Path) -> None:
    """A 16-bit Flux file with one block of each kind, random weights."""
    from safetensors.torch import save_file

    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        tensors[f"{name}.weight"] = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(
            0, 0.02
        )
        tensors[f"{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    for name in NORMS:
        tensors[f"{name}.weight"] = torch.ones(HEAD, dtype=torch.bfloat16)
    save_file(tensors, path)


def statistics_for(path: Path) -> Statistics:
    """Recorded inputs of the size that a calibration has, with some outlier channels."""
    found = Statistics("Flux", num_runs=1)
    for job in plan_conversion(read_header(path)).jobs:
        if job.chunks:
            continue
        rows = torch.randn(64, job.num_columns)
        rows[:, torch.randperm(job.num_columns)[: job.num_columns // 100]] *= 10
        inputs = LayerInputs(rows.abs().amax(0), rows.bfloat16(), 16)
        found.layers[job.sources[0]] = inputs
    return found


def seconds_by_block(
    source: Path, target: Path, config: ConvertConfig, statistics: Statistics | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Wall and CPU seconds of the conversion by block kind of the source."""
    jobs = plan_conversion(read_header(source)).jobs
    clocks = (time.perf_counter, time.process_time)
    spent = tuple(dict.fromkeys(BLOCKS, 0.0) for _ in clocks)
    last = [clock() for clock in clocks]

    def progress(done: int, total: int) -> None:
        block = jobs[done - 1].sources[0].split(".")[0]
        for i, clock in enumerate(clocks):
            now = clock()
            spent[i][block] += now - last[i]
            last[i] = now

    convert(source, target, config, statistics=statistics, progress=progress)
    return spent[0], spent[1]


def measure(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """One row of the page."""
    config, calibrated = CASES[name]
    target = folder / "svdq.safetensors"
    statistics = statistics_for(source) if calibrated else None
    wall, cpu = seconds_by_block(source, target, config, statistics)
    minutes = [sum(s[block] * n for block, n in BLOCKS.items()) / 60 for s in (wall, cpu)]
    size = target.stat().st_size
    target.unlink()
    return {
        "name": name,
        "seconds_per_block": {block: round(seconds, 2) for block, seconds in wall.items()},
        "minutes": round(minutes[0], 1),
        "cpu_minutes": round(minutes[1], 1),
        "bytes": [source.stat().st_size, size],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PACK_ROOT / "output" / "bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {
        "command": f"python bench svdquant_convert --threads {options.threads} "
        f"--rounds {options.rounds}",
        "num_rounds": options.rounds,
        "environment": environment(cpu=True),
        "goal_minutes": GOAL_MINUTES,
        "num_blocks": BLOCKS,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "flux.safetensors"
        write_source(source)
        for name in CASES:
            rounds = [measure(name, source, Path(folder)) for _ in range(options.rounds)]
            slowest = max(row["minutes"] for row in rounds)
            best = min(rounds, key=lambda row: row["minutes"]) | {"slowest_minutes": slowest}
            found["rows"].append(best)
            print(json.dumps(best))
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "svdquant-convert.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "svdquant-convert.md").write_text(convert_page(found), "utf-8")
    return 0
