"""Kernels that failed in a run: for the shape they failed on, and wholly after a few shapes."""

import torch

from .. import host
from .request import Request
from .timings import shape_key

MOST_SHAPES = 3  # different shapes that a kernel may fail on before the run gives it up
# CUDA errors after which the context is dead (the runtime API's cudaError_t says which are).
FATAL = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
)


def must_raise(error: Exception) -> bool:
    """Whether nothing can go on after `error`: a dead CUDA context, or the user's own cancel."""
    return host.is_interrupt(error) or any(word in str(error) for word in FATAL)


def sentence(kernel_id: str, error: Exception, doing: str = "") -> str:
    """What the report says of a failure: "sage2 ran out of memory while it was checked"."""
    suffix = f" {doing}" if doing else ""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{kernel_id} ran out of memory{suffix}"
    lines = str(error).strip().splitlines()
    text = lines[0][:160] if lines else "no message"
    return f"{kernel_id} failed{suffix} ({type(error).__name__}: {text})"


class Failures:
    """Why a kernel is not tried again. One failing call is no verdict on the other layers."""

    def __init__(self) -> None:
        self._by_shape: dict[str, dict[str, str]] = {}  # kernel id -> shape -> sentence
        self._whole: dict[str, str] = {}  # kernel id -> sentence

    def add(self, kernel_id: str, request: Request, why: str, *, transient: bool = False) -> None:
        """transient: says nothing about other shapes (out of memory)."""
        shapes = self._by_shape.setdefault(kernel_id, {})
        shapes[shape_key(request)] = why
        if not transient and len(shapes) >= MOST_SHAPES:
            self._whole.setdefault(kernel_id, why)

    def give_up(self, kernel_id: str, why: str) -> None:
        """Not used again in this run."""
        self._whole[kernel_id] = why

    def against(self, request: Request) -> dict[str, str]:
        """kernel id -> sentence, for every kernel that is not to be tried for this request."""
        shape = shape_key(request)
        found = {name: by[shape] for name, by in self._by_shape.items() if shape in by}
        return {**found, **self._whole}

    def clear(self) -> None:
        self._by_shape.clear()
        self._whole.clear()
