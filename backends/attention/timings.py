"""How long a kernel takes on this device for this shape: measured once, kept between starts."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..store import Store
from .request import Request

FILE_NAME = "slipstream_attention_timings.json"
FORMAT = 2

Milliseconds = dict[str, float]  # by kernel id


def bucket(tokens: int) -> int:
    """Token counts that share a timing: eighths of a power of two."""
    step = max(1, 1 << max(tokens.bit_length() - 4, 0))
    return (tokens + step - 1) // step * step


def shape_key(request: Request) -> str:
    """What a timing depends on, apart from the device and the versions."""
    width = f"{request.head_dim}"
    if request.value_dim not in (None, request.head_dim):
        width += f"/{request.value_dim}"
    sizes = (
        f"b{request.batch}h{request.heads}/{request.kv_heads}"
        f"q{bucket(request.q_tokens)}k{bucket(request.k_tokens)}d{width}"
    )
    scale = " scaled" if request.has_scale else ""
    return f"{sizes} {request.dtype} mask={request.mask}{request.mask_dims}{scale}"


def machine_key(device_name: str, versions: Mapping[str, str]) -> str:
    """Device and versions of what decides speed and accuracy; ComfyUI's own is none of them."""
    kept = sorted((name, v) for name, v in versions.items() if name != "comfyui")
    return " ".join([device_name, *(f"{name}={v}" for name, v in kept)])


class Timings:
    """Milliseconds by device, shape and kernel. forget: begin without what was measured before."""

    def __init__(self, folder: Path | None, versions: Mapping[str, str], *, forget: bool = False):
        self._store = Store(folder, FILE_NAME, FORMAT)
        self._versions, self._forget = dict(versions), forget
        self._new: dict[str, dict[str, Milliseconds]] = {}

    @cached_property
    def _known(self) -> dict[str, dict[str, Milliseconds]]:
        """Read at the first question, which a CPU never asks."""
        return {} if self._forget else self._read()

    def get(self, request: Request, kernel_id: str) -> float | None:
        machine, shape = self._keys(request)
        for known in (self._new, self._known):
            found = known.get(machine, {}).get(shape, {}).get(kernel_id)
            if found is not None:
                return found
        return None

    def put(self, request: Request, kernel_id: str, milliseconds: float) -> None:
        machine, shape = self._keys(request)
        kernels = self._new.setdefault(machine, {}).setdefault(shape, {})
        kernels[kernel_id] = round(milliseconds, 5)

    def save(self) -> str | None:
        """Write what was added; returns a sentence if the file cannot be written."""
        if not self._new:
            return None
        everything = self._read()
        for machine, shapes in self._new.items():
            for shape, kernels in shapes.items():
                everything.setdefault(machine, {}).setdefault(shape, {}).update(kernels)
        why = self._store.write({"timings": everything})
        if why is not None:
            return f"Attention timings: {why}"
        self._known.update(everything)
        self._new = {}
        return None

    def _keys(self, request: Request) -> tuple[str, str]:
        return machine_key(request.device_name, self._versions), shape_key(request)

    def _read(self) -> dict[str, dict[str, Milliseconds]]:
        timings: Any = self._store.read().get("timings")
        return timings if _well_formed(timings) else {}


def _well_formed(timings: Any) -> bool:
    """device -> shape -> kernel -> positive milliseconds, and nothing else."""
    return isinstance(timings, dict) and all(
        isinstance(kernels, dict)
        and all(isinstance(ms, (int, float)) and ms > 0 for ms in kernels.values())
        for kernels in _values(timings)
    )


def _values(nested: Mapping[str, Any]) -> Iterable[Any]:
    """The values of the inner dicts; an outer value that is no dict stands for itself."""
    for inner in nested.values():
        yield from inner.values() if isinstance(inner, dict) else (inner,)
