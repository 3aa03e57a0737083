"""Which kernel computes which segment of a loaded model, and what to say about it.

Chosen once per kind of segment and device: the kernel that was asked for, else by measurement on
a GPU, else the first that can. Counts and reasons are for the report; no tensors are kept.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..host import is_interrupt
from ..registry import Choice, reason_against, select
from .errors import BackendError
from .kernels import KERNELS, Kernel, LayerRequest
from .linear import Session
from .weight import Facts, Segment

log = logging.getLogger("slipstream")
FALLBACKS = ("kitchen", "dequant")  # what stands in where the kernel that was asked for cannot
OPTIONAL = ("kitchen", "nunchaku")  # other packages' kernels, whose first call may raise anything


def request_of(
    segment: Segment, device: torch.device, dtype: torch.dtype | None = None
) -> LayerRequest:
    """What the eligibility rules need to know of a segment on a device; dtype: computed in."""
    return request_for(segment.facts, dtype or segment.dtype, device)


def request_for(facts: Facts, dtype: torch.dtype, device: torch.device) -> LayerRequest:
    """The same before the segment is read."""
    capability = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    return LayerRequest(
        precision=facts.precision,
        device_type=device.type,
        dtype=str(dtype).removeprefix("torch."),
        num_rows=facts.num_rows,
        num_columns=facts.num_columns,
        unsigned=facts.unsigned,
        capability=capability,
        is_hip=torch.version.hip is not None,
    )


@dataclass
class Engine:
    """backend: as asked for; compute: what ComfyUI computes this model in here (None: the dtype of
    the segments); order: kernel ids by measured speed per precision (auto only).

    failed: (kernel id, precision) -> why that kernel is not used for it, whatever it says itself;
    notices: what the loader's node shows; measure_later: measures what had no memory before.
    """

    backend: str = "auto"
    compute: torch.dtype | None = None
    order: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # kernel id -> why it does not run
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    session: Session | None = None
    kernels: tuple[Kernel, ...] = KERNELS
    measure_later: Callable[[], None] | None = None
    _chosen: dict[tuple[Any, ...], Kernel] = field(default_factory=dict)

    def kernel(self, segment: Segment, x: torch.Tensor) -> Kernel:
        """The kernel for a segment whose input is x; the first call of each kind is guarded."""
        key = (segment.facts, x.dtype, x.device)
        kernel = self._chosen.get(key)
        if kernel is not None:
            return kernel
        request = request_of(segment, x.device, x.dtype)
        kernel = self.choose(request)
        if kernel.id in OPTIONAL:
            return _FirstCall(self, kernel, request, key)
        self._chosen[key] = kernel
        return kernel

    def candidates(self, precision: str) -> list[Kernel]:
        """In the order of preference; reference only if asked for."""
        by_id = {kernel.id: kernel for kernel in self.kernels}
        if self.backend != "auto":
            ids = [self.backend, *FALLBACKS]
        else:
            measured = self.order.get(precision, ())
            ids = [*measured, *(i for i in by_id if i not in (*measured, "nunchaku", "reference"))]
        return [by_id[i] for i in dict.fromkeys(ids) if i in by_id]

    def choose(self, request: LayerRequest) -> Kernel:
        """The first candidate that can; notes why those before it cannot."""
        failed = {i: why for (i, p), why in self.failed.items() if p == request.precision}
        found = select(self.candidates(request.precision), request, failed)
        assert isinstance(found, Choice), "dequant takes every segment"
        for name, reason in found.rejected.items():
            self.note(name, reason)
        return found.candidate

    def note(self, name: str, reason: str) -> None:
        """Keep the first reason against a kernel, for the report."""
        if name not in self.reasons:
            log.info("SVDQuant %s is not used: %s", name, reason)
            self.reasons[name] = reason

    def fail(self, name: str, precision: str, reason: str) -> None:
        """Do not use a kernel for this precision any more."""
        self.failed[name, precision] = reason
        self.note(name, reason)

    def measured(self, precision: str, order: tuple[str, ...]) -> None:
        """Follow this order from now on."""
        self.order[precision] = order
        self._chosen.clear()

    def require(self, requests: list[LayerRequest]) -> None:
        """Raise BackendError if the backend that was asked for can compute none of these."""
        if self.backend == "auto" or not requests:
            return
        kernel = next(k for k in self.kernels if k.id == self.backend)
        reasons = [reason_against(kernel, request) for request in requests]
        if all(reasons):
            raise BackendError(refusal(self.backend, str(reasons[0])))


def refusal(backend: str, reason: str) -> str:
    """The sentence for a backend that was asked for and cannot run."""
    return (
        f"backend {backend} cannot run this model here: {reason}. Choose backend auto or dequant."
    )


def is_fatal(error: BaseException) -> bool:
    """Whether an error says nothing about a kernel: the user's cancel, or memory that ran out."""
    return is_interrupt(error) or isinstance(error, torch.cuda.OutOfMemoryError)


class _FirstCall:
    """A kernel of another package until it has run once; what it raises is a reason then, and the
    next candidate computes instead. One that was asked for by name is an error."""

    def __init__(self, engine: Engine, kernel: Kernel, request: LayerRequest, key: tuple[Any, ...]):
        self.engine, self.kernel, self.request, self.key = engine, kernel, request, key
        self.id = kernel.id

    def available(self) -> str | None:
        return self.kernel.available()

    def ineligible(self, request: LayerRequest) -> str | None:
        return self.kernel.ineligible(request)

    def run(self, x: torch.Tensor, segment: Segment, **options: Any) -> torch.Tensor:
        while True:
            try:
                y = self.kernel.run(x, segment, **options)
            except Exception as error:
                if is_fatal(error) or self.kernel.id not in OPTIONAL:
                    raise
                self._failed(error)
            else:
                self.engine._chosen[self.key] = self.kernel
                return y

    def _failed(self, error: Exception) -> None:
        reason = failure(error)
        if self.engine.backend == self.kernel.id:
            raise BackendError(refusal(self.kernel.id, reason)) from error
        self.engine.fail(self.kernel.id, self.request.precision, reason)
        self.kernel = self.engine.choose(self.request)
        self.id = self.kernel.id


def failure(error: Exception) -> str:
    """The reason that an exception of a kernel gives."""
    return f"failed on this device: {type(error).__name__}: {error}"
