"""The page of docs/benchmarks on sequence parallel, from its JSON."""

from collections.abc import Callable
from typing import Any

from .tables import _preface, table

Json = dict[str, Any]


def parallel_page(found: Json) -> str:
    """docs/benchmarks/parallel.md"""
    parts = ["# Sequence parallel against one device", *_preface(found)]
    parts.append(
        f"Model: {found['model']}. Seconds per sampling step (all but the first), through a "
        "private ComfyUI server; a speed is the median of paired rounds with its quartiles. Every "
        "CPU rank has one thread, so has the server. Within noise means inside the band in which "
        "one device differs from itself."
    )
    header = ["devices", "layout", "speed", "quartiles", "goal", "verdict", "exchange", "broadcast"]
    rows = []
    for row in found["rows"]:
        speed, report = row["speed"], row["report"]
        seconds = report["seconds"]
        total = sum(seconds.values()) or 1.0
        rows.append([
            row["devices"],
            f"ulysses {report['ulysses']} x ring {report['ring']}",
            f"{speed['median']:.2f}x",
            f"{speed['low']:.2f} to {speed['high']:.2f}",
            f"{row['goal']}x" if row["goal"] else "-",
            row["verdict"],
            f"{seconds['exchange'] / total:.1%}",
            f"{seconds['broadcast'] / total:.1%}",
        ])  # fmt: skip
    parts.append(table(header, rows))
    low, high = found["rows"][0]["noise"]
    parts.append(
        f"{found['rows'][0]['speed']['num_pairs']} rounds; noise {low:.2f} to {high:.2f}. Exchange "
        "counts waiting for slower ranks. GPUs: **unverified**, nobody has run "
        "`python bench parallel --devices cuda:0,cuda:1 --model wan-1.3b --out docs/benchmarks`."
    )
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[Json], str]] = {"parallel": parallel_page}
