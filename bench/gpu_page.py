"""The page of docs/benchmarks on what `python bench gpu` did and could not do."""

from collections.abc import Callable
from typing import Any

from .tables import preface, table

Json = dict[str, Any]
DONE, FAILED, LEFT = "done", "failed", "not run"


def gpu_page(found: Json) -> str:
    """docs/benchmarks/gpu.md"""
    parts = ["# What was measured on a GPU", *preface(found)]
    rows = []
    for name, row in found["parts"].items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        rows.append([name, row["title"], row["state"], seconds, _cell(row.get("why", ""))])
    parts.append(table(["part", "what", "", "seconds", "why"], rows))
    if found.get("interrupted"):
        parts.append("**Partial**: ended by Ctrl-C.")
    if found["comfyui"]:
        parts.append(f"ComfyUI could not be used: {found['comfyui']}")
    lines = [f"- {name}: {why}" for name, why in found["missing"].items()]
    parts += ["Attention kernels that were not installed:\n\n" + "\n".join(lines)] if lines else []
    failed = {name: row["log"] for name, row in found["parts"].items() if row.get("log")}
    for name, log in failed.items():
        parts += [f"## {name} failed", "```text\n" + "\n".join(log) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: dict[str, Callable[[Json], str]] = {"gpu": gpu_page}
