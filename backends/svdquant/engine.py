"""Which kernel computes which segment of a loaded model, and what to say about it.

Chosen once per kind of segment and device: the kernel that was asked for, else by measurement on
a GPU, else the first that can. Counts and reasons are for the report; no tensors are kept.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from ..registry import Choice, reason_against, select
from .errors import BackendError
from .kernels import KERNELS, Kernel, LayerRequest
from .linear import Session
from .weight import Facts, Segment

log = logging.getLogger("slipstream")
FALLBACKS = ("kitchen", "dequant")  # what stands in where the kernel that was asked for cannot


def request_of(segment: Segment, device: torch.device) -> LayerRequest:
    """What the eligibility rules need to know of a segment on a device."""
    return request_for(segment.facts, segment.dtype, device)


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
    """backend: as asked for; order: kernel ids by measured speed per precision (auto only)."""

    backend: str = "auto"
    order: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # kernel id -> why it does not run
    session: Session | None = None
    kernels: tuple[Kernel, ...] = KERNELS
    _chosen: dict[tuple[Any, ...], Kernel] = field(default_factory=dict)

    def kernel(self, segment: Segment, x: torch.Tensor) -> Kernel:
        """The kernel for a segment whose input is x."""
        key = (segment.facts, segment.dtype, x.device)
        kernel = self._chosen.get(key)
        if kernel is None:
            kernel = self._chosen[key] = self.choose(request_of(segment, x.device))
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
        found = select(self.candidates(request.precision), request)
        assert isinstance(found, Choice), "dequant takes every segment"
        for name, reason in found.rejected.items():
            if name not in self.reasons:
                log.info("SVDQuant %s is not used: %s", name, reason)
            self.reasons.setdefault(name, reason)
        return found.candidate

    def require(self, requests: list[LayerRequest]) -> None:
        """Raise BackendError if the backend that was asked for can compute none of these."""
        if self.backend == "auto" or not requests:
            return
        kernel = next(k for k in self.kernels if k.id == self.backend)
        reasons = [reason_against(kernel, request) for request in requests]
        if all(reasons):
            raise BackendError(
                f"backend {self.backend} cannot run this model here: {reasons[0]}. "
                "Choose backend auto or dequant."
            )
