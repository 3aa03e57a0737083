"""The cache's pages of docs/benchmarks, from their JSON."""

from collections.abc import Callable
from typing import Any

from .tables import preface, table

Json = dict[str, Any]


def numbers_page(found: Json) -> str:
    """docs/benchmarks/cache.md"""
    parts = ["# Cache: cost of a decision, blocks that still run", *preface(found)]
    parts.append(
        "A decision is one evaluation of one branch: is there something to reuse, has the front "
        "changed little enough, what is added. Without the model."
    )
    rows = [[name, f"{us:.1f}"] for name, us in found["decision_us"].items()]
    parts.append(table(["engine", "microseconds"], rows))
    parts.append(
        "Tiny Flux (14 blocks) and Wan (10), random weights, 20 steps, euler, cfg 4, "
        "`cache_ratio` 0.5. The error is mean|plain - cached| / mean|plain|: it ranks mechanisms "
        "and says nothing about pictures. For times and pictures see quality.md and suite.md."
    )
    header = ["model", "strategy", "reused", "blocks", "fewer", "error", "held at peak"]
    rows = []
    for row in found["strategies"]:
        name = row["strategy"]
        if row["did"] != name:
            name += f" ({row['did']})"
        rows.append(
            [
                row["family"],
                name,
                f"{row['hits']} of 20",
                f"{row['plain_blocks']} -> {row['blocks']}",
                f"{row['fewer']:.2f}x",
                f"{row['relative_error']:.4f}",
                f"{row['peak_bytes'] / 1024:.0f} KiB",
            ]
        )
    parts.append(table(header, rows))
    parts.append("pab and fastercache-cfg skip attention calls and branches, not blocks.")
    return "\n\n".join(parts) + "\n"


def peers_page(found: Json) -> str:
    """docs/benchmarks/cache-peers.md"""
    parts = ["# The cache beside others", *preface(found)]
    parts.append(
        "Each side in a process of its own, on tiny Flux and Wan with random weights, 20 steps, "
        "euler, cfg 4, fp32, with the pack's own defaults. The error is mean|plain - cached| / "
        "mean|plain|, with cond and uncond in one call and in two (prompts of other lengths make "
        "ComfyUI split them). The last columns are about the MODEL that the node did not touch."
    )
    header = [
        "side",
        "model",
        "fewer blocks",
        "error, one call",
        "error, two calls",
        "same seed again",
        "MODEL without the node afterwards",
        "attributes left on it",
    ]
    parts.append(table(header, [_peer_row(row) for row in found["sides"]]))
    failed = [row for row in found["sides"] if "failed" in row]
    if failed:
        lines = [f"- {row['side']}, {row['family']}: {row['failed']}" for row in failed]
        parts.append("Does not run on this ComfyUI:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _peer_row(row: Json) -> list[str]:
    if "failed" in row:
        return [row["side"], row["family"], *["-"] * 6]
    after = "the same, bit for bit"
    if not row["unnoded_equal"]:
        after = f"**changed**, error {row['unnoded_error']:.3f}"
    return [
        row["side"],
        row["family"],
        f"{row['fewer_blocks']:.2f}x",
        f"{row['error_batched']:.3f}",
        f"{row['error_split']:.3f}",
        "identical" if row["repeats"] else "**another image**",
        after,
        str(row["attributes_left"]),
    ]


PAGES: dict[str, Callable[[Json], str]] = {"cache": numbers_page, "cache-peers": peers_page}
