"""What one attention call asks for, without tensors: the key of every decision."""

from dataclasses import dataclass
from typing import NamedTuple

MASK_NONE, MASK_BOOL, MASK_BIAS = "none", "bool", "bias"


class BlockKey(NamedTuple):
    """Where a call comes from: ComfyUI's block id, and which call of that block it is.

    Without a block id, block_type is "call", block_index 0, and ordinal counts over the model call.
    """

    block_type: str
    block_index: int
    ordinal: int

    def __str__(self) -> str:
        if self.block_type == "call":
            return f"call/{self.ordinal}"
        suffix = f".{self.ordinal}" if self.ordinal else ""
        return f"{self.block_type}/{self.block_index}{suffix}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call, as the eligibility rules see it.

    device_type: torch's; device_name: the GPU's product name, "" elsewhere; capability: CUDA
    compute capability or None; is_hip: ROCm, which torch shows as cuda with SM-shaped
    capabilities; dtype: torch's name without the prefix; batch, heads, kv_heads, q_tokens,
    k_tokens, head_dim: sizes; value_dim: head_dim of v, None if the same; mask: none, bool or
    bias; mask_dims: which of its dims are not broadcast, of "bhqk"; has_scale: a scale other than
    head_dim ** -0.5; low_precision: the caller allows it; want_lse: the caller needs the
    log-sum-exp; dense: the schedule wants an exact kernel here; capturing: inside a CUDA graph
    capture.
    """

    device_type: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    value_dim: int | None = None
    capability: tuple[int, int] | None = None
    is_hip: bool = False
    device_name: str = ""
    mask: str = MASK_NONE
    mask_dims: str = ""
    has_scale: bool = False
    low_precision: bool = True
    want_lse: bool = False
    dense: bool = False
    capturing: bool = False

    @property
    def is_gqa(self) -> bool:
        return self.kv_heads != self.heads

    @property
    def has_mask(self) -> bool:
        return self.mask != MASK_NONE

    @property
    def sm(self) -> int | None:
        """Compute capability as one number (SM89 = 89), None on ROCm and without CUDA."""
        if self.capability is None or self.is_hip:
            return None
        return self.capability[0] * 10 + self.capability[1]
