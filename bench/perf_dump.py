"""Timings of a side under the names of SGLang-Diffusion's perf dump, so that its tools read them.

Names: `dump_benchmark_report` in sgl-project/sglang, python/sglang/multimodal_gen/runtime/utils/
perf_logger.py. Every side of a suite.json is such a dump with the suite's own fields beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .trained import Sampled

STAGE = "DenoisingStage"
FIELDS = (
    "timestamp",
    "request_id",
    "commit_hash",
    "tag",
    "total_duration_ms",
    "steps",
    "denoise_steps_ms",
    "memory_checkpoints",
    "meta",
)


def perf_dump(
    runs: Sequence[Sampled], *, request_id: str = "", made: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Medians over the runs. made: the environment() of the measurement."""
    made = made or {}
    steps = torch.tensor([run.step_ms for run in runs], dtype=torch.float64).median(0).values
    total = torch.tensor([run.seconds for run in runs], dtype=torch.float64).median().item() * 1000
    return {
        "timestamp": made.get("date", ""),
        "request_id": request_id,
        "commit_hash": made.get("commit") or "N/A",
        "tag": "benchmark_dump",
        "total_duration_ms": round(total, 2),
        "steps": [{"name": STAGE, "duration_ms": round(total, 2)}],
        "denoise_steps_ms": [
            {"step": index, "duration_ms": round(ms, 3)} for index, ms in enumerate(steps.tolist())
        ],
        "memory_checkpoints": memory_checkpoints(),
        "meta": {"num_runs": len(runs), "clock": made.get("clock", "wall")},
    }


def memory_checkpoints() -> dict[str, dict[str, float]]:
    """The device's memory after the stage, in MiB; empty without a CUDA device."""
    if not torch.cuda.is_available():
        return {}
    found = {
        "allocated_mb": torch.cuda.memory_allocated(),
        "reserved_mb": torch.cuda.memory_reserved(),
        "peak_allocated_mb": torch.cuda.max_memory_allocated(),
        "peak_reserved_mb": torch.cuda.max_memory_reserved(),
    }
    return {f"after_{STAGE}": {name: round(size / 2**20, 2) for name, size in found.items()}}
