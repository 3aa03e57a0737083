"""OffloadConfig: the node's three numbers, checked once, the same in a worker and in the report."""

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SlipstreamError
from ..memory.section import GIB

MODES = ("auto", "speed", "memory", "manual", "off")


class OffloadError(SlipstreamError, ValueError):
    """A setting that this model, device or ComfyUI cannot follow; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How much VRAM one model may use, and how its blocks are fetched ahead.

    mode: auto, speed, memory, manual or off; vram_budget_gb: GiB for weights and staging buffers,
    0 = the mode decides; prefetch: 0 = one block ahead, below 1 = that share of the blocks,
    1 and above = that many, -1 = ComfyUI's own streaming per module.
    """

    mode: str = "auto"
    vram_budget_gb: float = 0.0
    prefetch: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OffloadError(f"offload mode is '{self.mode}': choose one of {', '.join(MODES)}")
        if not 0 <= self.vram_budget_gb < float("inf"):
            raise OffloadError(
                f"vram_budget_gb is {self.vram_budget_gb}: use 0 (the mode decides) or more"
            )
        whole = self.prefetch >= 1 and float(self.prefetch).is_integer()
        if not (self.prefetch == -1 or 0 <= self.prefetch < 1 or whole):
            raise OffloadError(
                f"prefetch is {self.prefetch}: it must be -1, a fraction below 1, "
                "or a whole number of blocks"
            )

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, None where the mode decides."""
        return int(self.vram_budget_gb * GIB) if self.vram_budget_gb > 0 else None

    def depth(self, num_blocks: int) -> int:
        """Blocks to stage ahead of the running one; -1: none, ComfyUI streams per module.

        Source: the meaning of SGLang's --dit-offload-prefetch-size.
        """
        if self.prefetch < 0 or num_blocks < 1:
            return -1
        if self.prefetch < 1:
            return 1 + round(self.prefetch * (num_blocks - 1))
        return min(int(self.prefetch), num_blocks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "OffloadConfig":
        """The config that `to_json` wrote. Raises OffloadError for a field it does not know."""
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise OffloadError(f"offload config has unknown fields: {', '.join(unknown)}")
        return cls(**fields)
