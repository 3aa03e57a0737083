"""How long SVDQuant Convert takes for a 12B model, from one block of each kind at full width.

    python bench svdquant_convert [--threads 2] [--rank 32] [--search] [--no-statistics]

Writes a 16-bit Flux file of random weights with one double and one single block (1 GB) into a
temporary folder, converts it and multiplies each block's time by Flux's 19 and 38. Random weights
take as long as trained ones; how good the result is this does not tell.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..backends.svdquant.config import ConvertConfig
from ..backends.svdquant.convert import convert
from ..backends.svdquant.families.flux import FLUX
from ..backends.svdquant.header import read_header
from ..backends.svdquant.plan import plan_conversion
from ..backends.svdquant.statistics import LayerInputs, Statistics

WIDTH, HEAD = 3072, 128
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--no-statistics", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = ConvertConfig(precision=options.precision, rank=options.rank, search=options.search)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "flux.safetensors", Path(folder) / "svdq.safetensors"
        write_source(source)
        statistics = None if options.no_statistics else statistics_for(source)
        wall, cpu = seconds_by_block(source, target, config, statistics)
        sizes = source.stat().st_size, target.stat().st_size
    minutes = [sum(s[block] * n for block, n in BLOCKS.items()) / 60 for s in (wall, cpu)]
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "family": FLUX.title,
        "threads": options.threads,
        "rank": options.rank,
        "precision": options.precision,
        "search": options.search,
        "statistics": not options.no_statistics,
        "seconds_per_block": {block: round(seconds, 2) for block, seconds in wall.items()},
        "minutes_for_the_whole_model": round(minutes[0], 1),
        "cpu_minutes_for_the_whole_model": round(minutes[1], 1),
        "bytes_of_the_blocks_16_bit_and_4_bit": sizes,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    print(json.dumps(result, indent=2))
    return 0
