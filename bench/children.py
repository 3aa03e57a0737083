"""Measurements in a process of their own: a crash on the GPU there ends nothing here."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from .setup_env import PACK_ROOT

# What starts a measurement; tests name a program that fakes a GPU first.
ENTRY = "SLIPSTREAM_BENCH_ENTRY"
_MARK = "answer: "
_KEPT_BYTES = 65536


def command(name: str, *arguments: str) -> list[str]:
    """`python bench NAME ...` for a process that sees the device that this one sees."""
    return [sys.executable, os.environ.get(ENTRY, str(PACK_ROOT / "bench")), name, *arguments]


def answer(said: dict[str, Any]) -> None:
    """A child's side of ask()."""
    print(_MARK + json.dumps(said), flush=True)


def ask(name: str, *arguments: str) -> dict[str, Any]:
    """What `python bench NAME ...` answers, or {"error": its last line}; its stderr is shown."""
    process = subprocess.Popen(
        command(name, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = bytearray()
    reader = threading.Thread(target=_show, args=(process.stderr, said), daemon=True)
    reader.start()
    try:
        out = process.stdout.read().decode("utf-8", "replace")
        process.wait()
    finally:
        process.kill()
        process.wait()
    reader.join()
    lines = [line for line in out.splitlines() if line.startswith(_MARK)]
    if lines:
        return json.loads(lines[-1][len(_MARK) :])
    last = last_line(said.decode("utf-8", "replace"))
    return {"error": last or f"exit status {process.returncode}"}


def _show(source: IO[bytes], said: bytearray) -> None:
    """Pass on what a child says while it says it, progress included; keep its end."""
    while chunk := os.read(source.fileno(), 4096):
        sys.stderr.write(chunk.decode("utf-8", "replace"))
        sys.stderr.flush()
        said += chunk
        del said[:-_KEPT_BYTES]


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
