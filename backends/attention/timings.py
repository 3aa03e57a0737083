"""How long a kernel takes on this device for this shape: measured once, kept between starts.

The file is JSON in ComfyUI's user folder, written atomically; a damaged or foreign one is
ignored and written anew.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .request import Request

FILE_NAME = "slipstream_attention_timings.json"
FORMAT = 1
_WARMUP, _REPEATS = 1, 3


def measure_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of `call` over three runs after one warm-up, by the device's clock."""
    for _ in range(_WARMUP):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
        return sorted(times)[_REPEATS // 2]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    with torch.cuda.device(device):
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[_REPEATS // 2]


def bucket(tokens: int) -> int:
    """Token counts that share a timing: eighths of a power of two."""
    step = max(1, 1 << max(tokens.bit_length() - 4, 0))
    return (tokens + step - 1) // step * step


def shape_key(request: Request) -> str:
    """What a timing depends on, apart from the device and the versions."""
    sizes = (
        f"b{request.batch}h{request.heads}/{request.kv_heads}"
        f"q{bucket(request.q_tokens)}k{bucket(request.k_tokens)}d{request.head_dim}"
    )
    return f"{sizes} {request.dtype} mask={request.mask}"


class Timings:
    """Milliseconds by shape and kernel, for one device and set of versions."""

    def __init__(self, folder: Path | None, device_name: str, versions: Mapping[str, str]):
        self._path = folder / FILE_NAME if folder is not None else None
        self._section = " ".join([device_name, *(f"{k}={v}" for k, v in sorted(versions.items()))])
        self._changed = False

    @cached_property
    def _mine(self) -> dict[str, dict[str, float]]:
        """Shape -> kernel -> milliseconds; read at the first question, which a CPU never asks."""
        return self._read().get(self._section, {})

    def get(self, request: Request, kernel_id: str) -> float | None:
        return self._mine.get(shape_key(request), {}).get(kernel_id)

    def put(self, request: Request, kernel_id: str, milliseconds: float) -> None:
        self._mine.setdefault(shape_key(request), {})[kernel_id] = round(milliseconds, 5)
        self._changed = True

    def save(self) -> str | None:
        """Write what was added; returns a sentence if the file cannot be written."""
        if self._path is None or not self._changed:
            return None
        others = self._read()
        others[self._section] = {**others.get(self._section, {}), **self._mine}
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": FORMAT, "timings": others}, indent=1))
            os.replace(temporary, self._path)
        except OSError as error:
            return f"Attention timings could not be saved to {self._path.name} ({error.strerror})"
        self._changed = False
        return None

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return {}
        timings: Any = content.get("timings")
        return dict(timings) if _well_formed(timings) else {}


def _well_formed(timings: Any) -> bool:
    """device -> shape -> kernel -> positive milliseconds, and nothing else."""
    return isinstance(timings, dict) and all(
        isinstance(shapes, dict)
        and all(
            isinstance(kernels, dict)
            and all(isinstance(ms, (int, float)) and ms > 0 for ms in kernels.values())
            for kernels in shapes.values()
        )
        for shapes in timings.values()
    )
