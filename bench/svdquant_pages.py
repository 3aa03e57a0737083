"""The pages of docs/benchmarks on SVDQuant, from their JSON."""

from collections.abc import Callable
from typing import Any

from .tables import preface, table

Json = dict[str, Any]
DENSE = "bf16 Linear"


def convert_page(found: Json) -> str:
    """docs/benchmarks/svdquant-convert.md"""
    parts = ["# How long SVDQuant Convert takes", *preface(found)]
    kinds = {name: name.removesuffix("s").replace("_", " ") for name in found["num_blocks"]}
    blocks = " and ".join(f"{found['num_blocks'][name]} {kinds[name]}s" for name in kinds)
    parts.append(
        f"A 12B FLUX.1, extrapolated from one block of each kind at full width ({blocks}); random "
        f"weights; the quickest of {found['num_rounds']} rounds. "
        f"The goal is {found['goal_minutes']} minutes on two cores. The machine did other work at "
        "the time, as the slowest round shows. Processor minutes add up over threads."
    )
    header = ["setting", "minutes", "goal", "slowest round", "processor minutes"]
    header += [f"s a {kind}" for kind in kinds.values()]
    header += ["size of the blocks"]
    parts.append(table(header, [_convert_row(found, row) for row in found["rows"]]))
    parts.append(
        f"Peak memory of the process: {found['peak_memory_bytes'] / 1e9:.1f} GB, for torch, the "
        "source (1.1 GB, made in memory) and the largest layer in fp32."
    )
    return "\n\n".join(parts) + "\n"


def _convert_row(found: Json, row: Json) -> list[str]:
    before, after = row["bytes"]
    return [
        row["name"],
        f"{row['minutes']:.1f}",
        "met" if row["minutes"] <= found["goal_minutes"] else "missed",
        f"{row['slowest_minutes']:.1f}",
        f"{row['cpu_minutes']:.1f}",
        *(f"{row['seconds_per_block'][name]:.1f}" for name in found["num_blocks"]),
        f"{after / before:.0%} of 16-bit",
    ]


_LOADS = {
    "off": "`keep_unpacked` off: every load",
    "first": "first load, which makes the copy",
    "second": "every later load",
}


def load_page(found: Json) -> str:
    """docs/benchmarks/svdquant-load.md"""
    size, blocks = found["file_bytes"], found["num_blocks"]
    goals, goal_private = found["goal_seconds"], found["goal_private"]
    parts = ["# How long SVDQuant Loader takes", *preface(found)]
    parts.append(
        f"A Qwen-Image file of {blocks} blocks (the model has 60) at full width, rank 128, random "
        f"codes: {size / 1e9:.1f} GB, its unpacked copy {(found['copy_bytes'] or 0) / 1e9:.1f} GB. "
        "From the file to the MODEL on a CPU, each time in a fresh process; the files are in the "
        "system's file cache as far as they fit. Goals for 60 blocks on two idle cores: "
        f"{goals['first']} s and {goals['second']} s, and after the second no private memory "
        f"beyond {goal_private:.0%} of the file. Where the load above is more than the cores, "
        "seconds are mostly waiting for other programs; processor seconds say what the work takes."
    )
    header = ["load", "seconds", "goal", "processor seconds", "private memory", "of the file"]
    header += ["a pass over all weights", "private memory then"]
    parts.append(table(header, [_load_row(found, row) for row in found["rows"]]))
    parts.append(
        "Private memory is what no file backs (`RssAnon`): it cannot be dropped and read again, "
        "and every process has its own. A mapped weight is read from the disk when it is first "
        "used; the pass over all weights shows that time and that it makes nothing private."
    )
    return "\n\n".join(parts) + "\n"


def _load_row(found: Json, row: Json) -> list[str]:
    name = _LOADS[row["case"]]
    if "error" in row:
        return [name, row["error"], *[""] * 6]
    goal = found["goal_seconds"].get(row["case"])
    goal = goal and goal * found["num_blocks"] / 60
    return [
        name,
        f"{row['seconds']:.1f}",
        "" if goal is None else "met" if row["seconds"] <= goal else "missed",
        f"{row['cpu_seconds']:.1f}",
        f"{row['private_bytes'] / 1e9:.2f} GB",
        f"{row['private_bytes'] / found['file_bytes']:.0%}",
        f"{row['read_seconds']:.1f} s",
        f"{row['private_bytes_after_use'] / 1e9:.2f} GB",
    ]


def methods_page(found: Json) -> str:
    """docs/benchmarks/svdquant-methods.md"""
    parts = ["# What each step of SVDQuant's quantiser buys", *preface(found)]
    parts.append(
        f"Relative error of a layer's output against the 16-bit layer, on inputs that calibration "
        f"has not seen; synthetic layers of {found['size']} x {found['size']}, mean of "
        f"{found['num_seeds']} seeds. 4-bit inputs are rounded as the kernels do it, full inputs "
        "are not. Layers with outliers have a power-law spectrum, heavy weights and uneven inputs; "
        "none are trained."
    )
    header = ["method", "outliers, 4-bit inputs", "outliers, full inputs"]
    header += ["Gaussian, 4-bit inputs", "Gaussian, full inputs"]
    rows = [
        [row["name"], *(f"{value:.3f}" for value in (*row["outliers"], *row["gaussian"]))]
        for row in found["rows"]
    ]
    parts.append(table(header, rows))
    return "\n\n".join(parts) + "\n"


def layers_page(found: Json) -> str:
    """docs/benchmarks/svdquant-layers.md"""
    parts = ["# 4-bit layers of Flux's widths, per backend", *preface(found)]
    parts.append(
        f"Random {found['precision']} weights of rank {found['rank']} beside a 16-bit Linear of "
        "the same weights: median of one call, peak memory of the call, and relative error against "
        "the unpacked weights. Times are the 16-bit layer's over the backend's."
    )
    for layer in dict.fromkeys(line["layer"] for line in found["lines"]):
        lines = [line for line in found["lines"] if line["layer"] == layer]
        dense = {one["rows"]: one["ms"] for one in lines if one["backend"] == DENSE and "ms" in one}
        measured = [line for line in lines if "ms" in line]
        header = ["rows", "backend", "ms", "times", "TFLOP/s", "peak MB", "rel. error"]
        rows = [_layer_row(line, dense.get(line["rows"])) for line in measured]
        parts += [f"## {layer}", table(header, rows)]
        reasons = {line["backend"]: line["reason"] for line in lines if "reason" in line}
        said = [f"- {name}: {why}" for name, why in reasons.items()]
        parts += ["Not measured:\n\n" + "\n".join(said)] if said else []
    return "\n\n".join(parts) + "\n"


def _layer_row(line: Json, dense_ms: float | None) -> list[str]:
    peak = f"{line['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in line else "-"
    times = f"{dense_ms / line['ms']:.2f}x" if dense_ms else "-"
    return [
        str(line["rows"]), line["backend"], f"{line['ms']:.3f}", times, f"{line['tflops']:.1f}",
        peak, f"{line['error']:.3f}",
    ]  # fmt: skip


def step_page(found: Json) -> str:
    """docs/benchmarks/svdquant-flux.md"""
    parts = ["# A step of Flux with 4-bit weights, per backend", *preface(found)]
    parts.append(
        f"Random {found['precision']} weights, {found['double']} double and {found['single']} "
        f"single blocks, {found['tokens']} image tokens: median of {found['repeats']} calls, each "
        "backend in a process of its own. bf16 is ComfyUI's own 16-bit model."
    )
    measured = [row for row in found["rows"] if "seconds" in row]
    dense = next((row["seconds"] for row in measured if row["backend"] == "bf16"), None)
    rows = [
        [
            row["backend"],
            f"{row['seconds']:.3f}",
            f"{dense / row['seconds']:.2f}x" if dense else "-",
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-",
        ]
        for row in measured
    ]
    parts.append(table(["backend", "seconds a step", "times", "weights GB", "peak GB"], rows))
    said = [f"- {row['backend']}: {row['error']}" for row in found["rows"] if "error" in row]
    parts += ["Not measured:\n\n" + "\n".join(said)] if said else []
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[Json], str]] = {
    "svdquant-convert": convert_page,
    "svdquant-load": load_page,
    "svdquant-methods": methods_page,
    "svdquant-layers": layers_page,
    "svdquant-flux": step_page,
}
