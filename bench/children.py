"""Measurements in a process of their own: a crash on the GPU there ends nothing here."""

import os
import sys
from pathlib import Path

from .setup_env import PACK_ROOT

# What starts a measurement; tests name a program that fakes a GPU first.
ENTRY = "SLIPSTREAM_BENCH_ENTRY"


def command(name: str, *arguments: str) -> list[str]:
    """`python bench NAME ...` for a process that sees the device that this one sees."""
    return [sys.executable, os.environ.get(ENTRY, str(PACK_ROOT / "bench")), name, *arguments]


def last_line(text: str) -> str:
    """What a program that failed said last."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def write_text(path: Path, text: str) -> None:
    """The whole text or, when something ends this process, the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
