"""The pages of docs/benchmarks on offload, from their JSON: a GPU's numbers, and Python's."""

from collections.abc import Callable
from typing import Any

from .tables import preface, table

Json = dict[str, Any]

IMAGE_GAIN = 0.15  # of a step, at full streaming, at one size or more
SAME = 1.03  # prefetch may be this much slower than ComfyUI's own streaming
PLAN_ERROR = 0.10
OVERHEAD = 0.01  # of a step with nothing offloaded
VIDEO = ("wan",)
LINES = {
    "run": "a run with any node of ours (steps, memory watch), per model call",
    "off": "mode off on top, per model call",
    "auto": "mode auto on top, all weights resident, per model call",
    "speed": "mode speed on top, all weights resident, per model call",
    "timed_block": "a block in one of the two steps per run that are timed",
}


def offload_page(found: Json) -> str:
    """docs/benchmarks/offload.md"""
    parts = ["# A VRAM budget on a GPU", *preface(found)]
    parts.append(
        "Random weights of full width, ComfyUI's own loader and sampler; seconds are medians of "
        "the steps behind the warm-up. Streamed means that no weight stays on the device. "
        "docs/offload.md says what the columns mean."
    )
    measured = [one for one in found["models"] if "error" not in one]
    if measured:
        parts += ["## Goals", table(["goal", "model", "found", ""], _goals(measured))]
    for one in found["models"]:
        parts.append(f"## {one['model']}, {one['manager']} memory management")
        parts += [f"Failed: {one['error']}"] if "error" in one else _model(one)
    return "\n\n".join(parts) + "\n"


def _goals(measured: list[Json]) -> list[list[str]]:
    rows = []
    for one in measured:
        name = f"{one['model']}, {one['manager']}"
        gains = [1 - t["prefetch"] / t["core"] for t in one["times"]]
        if one["model"] in VIDEO:
            good = min(gains) >= 1 - SAME
            rows.append(["never slower than ComfyUI's streaming", name, f"{min(gains):+.1%}", good])
        else:
            good = max(gains) >= IMAGE_GAIN
            rows.append([f"at least {IMAGE_GAIN:.0%} shorter", name, f"{max(gains):+.1%}", good])
        error = one["plan"]["error"]
        rows.append([f"plan within {PLAN_ERROR:.0%}", name, f"{error:.1%}", error <= PLAN_ERROR])
        cost = max(t["speed"] / t["resident"] - 1 for t in one["times"])
        rows.append(
            [f"under {OVERHEAD:.0%} if nothing is offloaded", name, f"{cost:+.1%}", cost < OVERHEAD]
        )
    return [[*row[:3], "met" if row[3] else "**missed**"] for row in rows]


def _model(one: Json) -> list[str]:
    pinned, pageable = (f"{rate / 1e9:.1f} GB/s" for rate in one["copy_rates"])
    weights = f"{one['weight_bytes'] / 1e9:.1f} GB of weights"
    caps = [
        [f"{cap['share']:.0%}", f"{cap['resident_bytes'] / 1e9:.2f}",
         f"{cap['excess_bytes'] / 1e6:+.0f}"]
        for cap in one["caps"]
    ]  # fmt: skip
    times = [
        [t["size"], *(f"{t[key]:.3f}" for key in ("copying", "resident", "speed", "core")),
         f"{t['prefetch']:.3f}", f"{1 - t['prefetch'] / t['core']:+.1%}", f"{t['overlap']:.0%}"]
        for t in one["times"]
    ]  # fmt: skip
    header = ["size", "copying alone", "resident", "resident, mode speed", "streamed by ComfyUI",
              "with prefetch", "gain", "copies hidden"]  # fmt: skip
    plan, growth = one["plan"], one["flat"]["growth_bytes"]
    grown = ", ".join(f"{name} {size / 1e6:+.0f} MB" for name, size in growth.items())
    return [
        f"{weights}; copies {pinned} from pinned RAM, {pageable} from pageable RAM.",
        table(["budget", "resident GB", "device MB against the budget"], caps),
        table(header, times),
        f"- equal bits with three seeds: {_yes(one['equal_bits'])}; with a cache: "
        f"{_yes(one['equal_bits_cached'])}\n"
        f"- planned step {plan['predicted']:.3f} s, measured {plan['measured']:.3f} s\n"
        f"- growth over {one['flat']['runs']} runs: {grown}",
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def overhead_page(found: Json) -> str:
    """docs/benchmarks/offload-overhead.md"""
    parts = ["# What a VRAM budget costs where nothing is offloaded", *preface(found)]
    parts.append(
        "Microseconds around a model that does nothing and whose weights all fit: medians of "
        "paired differences, with quartiles. A step of a model that people use takes tens of "
        "thousands of microseconds. Reading a GPU's memory counters and events comes on top there: "
        "**unverified**, `python bench offload` measures it as mode speed with all "
        "weights resident."
    )
    rows = []
    for name, line in LINES.items():
        low, high = found["costs"][name]["quartiles_us"]
        rows.append([line, f"{found['costs'][name]['median_us']:.1f}", f"{low:.1f} to {high:.1f}"])
    parts.append(table(["what", "microseconds", "quartiles"], rows))
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[Json], str]] = {
    "offload": offload_page,
    "offload-overhead": overhead_page,
}
