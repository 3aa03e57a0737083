"""The one signature of every kernel, and what it may know before it is chosen."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..layouts import UNSIGNED_SHIFT
from ..weight import Segment


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """One segment on one device, as the eligibility rules see it.

    precision: int4, nvfp4 or awq; device_type: torch's; capability: CUDA compute capability or
    None; is_hip: ROCm; dtype: torch's name without the prefix; unsigned: its input is shifted.
    """

    precision: str
    device_type: str
    dtype: str
    num_rows: int
    num_columns: int
    unsigned: bool = False
    capability: tuple[int, int] | None = None
    is_hip: bool = False

    @property
    def sm(self) -> int | None:
        """Compute capability as one number (SM89 = 89), None without CUDA."""
        if self.capability is None or self.is_hip:
            return None
        return self.capability[0] * 10 + self.capability[1]


class LowRank(NamedTuple):
    """A LoRA in addition to the segment's own branch: down [K, r], up [N, r], same dtype."""

    down: torch.Tensor
    up: torch.Tensor


class ShareKey(Protocol):
    """Where layers that read the same input leave their quantised activations to each other."""

    def get(self) -> Any | None: ...

    def put(self, value: Any) -> None: ...


class Kernel(Protocol):
    """Computes one segment: x [M, K] contiguous in the segment's dtype -> [M, N], fresh memory.

    extra: a LoRA; bias [N] or None; share: for a layer whose input others quantise alike. Padding
    and layout changes stay inside the kernel's file. It never writes to its inputs.
    """

    id: str

    def available(self) -> str | None: ...

    def ineligible(self, request: LayerRequest) -> str | None: ...

    def run(
        self,
        x: torch.Tensor,
        segment: Segment,
        *,
        bias: torch.Tensor | None = None,
        extra: LowRank | None = None,
        share: ShareKey | None = None,
    ) -> torch.Tensor: ...


def smoothed(x: torch.Tensor, segment: Segment) -> torch.Tensor:
    """[M, K]: what the 4-bit part of a segment multiplies, before it is rounded."""
    inputs = x + UNSIGNED_SHIFT if segment.facts.unsigned else x
    return inputs if segment.smooth is None else inputs / segment.smooth


def add_low_rank(
    y: torch.Tensor, x: torch.Tensor, segment: Segment, extra: LowRank | None
) -> torch.Tensor:
    """y [M, N], changed in place: plus the segment's own branch and the LoRA's, in x's dtype."""
    if segment.down is not None and segment.up is not None:
        side = (x @ segment.down) @ segment.up.t()
        if extra is not None:
            side.add_((x @ extra.down) @ extra.up.t())
        return y.add_(side)
    return y if extra is None else y.add_((x @ extra.down) @ extra.up.t())
