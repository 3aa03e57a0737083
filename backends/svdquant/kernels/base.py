"""The one signature of every kernel, and what it may know before it is chosen."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

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


def low_rank_output(
    x: torch.Tensor, segment: Segment, extra: LowRank | None
) -> torch.Tensor | None:
    """[M, N]: the segment's own branch and the LoRA's, computed in x's dtype; None if none."""
    y = None
    if segment.down is not None and segment.up is not None:
        y = (x @ segment.down) @ segment.up.t()
    if extra is not None:
        side = (x @ extra.down) @ extra.up.t()
        y = side if y is None else y.add_(side)
    return y
