"""The parts of `python bench gpu`, in the order of what they are worth."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .children import command
from .setup_env import PACK_ROOT

# Measured by parts of their own, from the same functions: twice would take the hour's other half.
_MEASURED_ELSEWHERE = ("test_offload_gpu.py",)
_REHEARSAL_S = (1.0, 300.0)


@dataclass(frozen=True)
class Part:
    """One command of the hour.

    arguments: of the command; program: "bench" or "test"; estimate_s: it does not start with less
    left; limit_s: it is ended then. needs_comfyui: imports ComfyUI. is_timed: takes --seconds.
    files: what it writes into the folder.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    estimate_s: float
    limit_s: float
    program: str = "bench"
    needs_comfyui: bool = False
    is_timed: bool = False
    files: tuple[str, ...] = ()

    def command(self, folder: Path, seconds: float, *, rehearse: bool) -> list[str]:
        """What runs it, given so many seconds."""
        if self.program == "test":
            return [sys.executable, str(PACK_ROOT / "test"), *self.arguments]
        more = ["--out", str(folder)]
        more += ["--seconds", f"{max(seconds - 40, 10):.0f}"] if self.is_timed else []
        more += ["--rehearse"] if rehearse else []
        return command(*self.arguments, *more)

    def times(self, *, rehearse: bool) -> tuple[float, float]:
        """(estimate, limit) in seconds."""
        return _REHEARSAL_S if rehearse else (self.estimate_s, self.limit_s)


def _pages(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names for kind in ("json", "md"))


def _tests() -> list[Part]:
    """./test gpu, a file of tests at a time: a crash in one leaves the others."""
    found = []
    for path in sorted((PACK_ROOT / "tests" / "gpu").glob("test_*.py")):
        if path.name not in _MEASURED_ELSEWHERE:
            name = path.stem.removesuffix("_gpu").replace("test_", "tests-")
            arguments = ("gpu", str(path.relative_to(PACK_ROOT)))
            title = f"./test gpu tests/gpu/{path.name}"
            found.append(Part(name, title, arguments, 60, 300, program="test"))
    return found


def _steps(model: str, title: str, estimate_s: float, limit_s: float) -> Part:
    return Part(
        f"steps-{model}",
        f"steps of full-width {title}: plain and each technique in turn",
        ("full_width", "--resume", "--models", model),
        estimate_s, limit_s, needs_comfyui=True, is_timed=True, files=_pages("full-width"),
    )  # fmt: skip


def _offload(model: str, manager: str) -> Part:
    return Part(
        f"offload-{model}-{manager}",
        f"offload of {model} at three budgets and streamed, {manager} memory management",
        ("offload", "--resume", "--models", model, "--managers", manager),
        240, 540, needs_comfyui=True, files=_pages("offload"),
    )  # fmt: skip


def parts() -> list[Part]:
    """All of them."""
    return [
        *_tests(),
        Part(
            "kernels", "every attention kernel, shape by shape", ("attention_kernels", "--resume"),
            120, 400, is_timed=True, files=_pages("attention"),
        ),
        _steps("flux", "Flux 1024 x 1024", 150, 300),
        _steps("wan-video", "Wan 480p, 81 frames", 180, 400),
        Part(
            "svdquant-layers", "4-bit layers of Flux's widths", ("svdquant_layers", "--resume"),
            60, 200, files=_pages("svdquant-layers"),
        ),
        Part(
            "svdquant-flux", "a step of Flux with 4-bit weights", ("svdquant_flux",),
            90, 300, needs_comfyui=True, files=_pages("svdquant-flux"),
        ),
        _offload("flux", "dynamic"),
        _offload("flux", "classic"),
        _steps("sdxl", "SDXL 1024 x 1024", 120, 240),
        _steps("qwen", "Qwen-Image 1024 x 1024", 150, 300),
        _offload("wan", "dynamic"),
        _steps("wan", "Wan 480p, 17 frames, cfg 5", 180, 300),
        _offload("wan", "classic"),
    ]  # fmt: skip


def rehearsed(found: Sequence[Part]) -> list[Part]:
    """Those that have a tiny form and need no real device: what a CPU can walk."""
    narrow = ("flux", "wan", "wan-video")
    return [
        part
        for part in found
        if part.program == "bench"
        and "dynamic" not in part.arguments
        and (part.arguments[0] not in ("full_width", "offload") or part.arguments[3] in narrow)
    ]
