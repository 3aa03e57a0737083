"""What the nodes ask for, checked once, as JSON for a worker and for the report."""

from dataclasses import asdict, dataclass
from typing import Any

BACKENDS = ("auto", "kitchen", "nunchaku", "dequant", "reference")
PRECISIONS = ("auto", "int4", "nvfp4")
DTYPES = ("auto", "bf16", "fp16", "fp32")
RANK_STEP = 16  # the file layouts hold the low-rank branch in columns of 16


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is '{value}': choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class SVDQuantConfig:
    """How a file is loaded. precision and rank only assert; rank 0 takes the file's.

    keep_unpacked: later loads map a copy in the unpacked form, which the first one writes.
    """

    backend: str = "auto"
    precision: str = "auto"
    rank: int = 0
    dtype: str = "auto"
    keep_unpacked: bool = True

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("dtype", self.dtype, DTYPES)
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}: use 0 for the file's rank, or that rank")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SVDQuantConfig":
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How a 16-bit file is quantised. search tries smaller group scales (slower, more exact)."""

    precision: str = "int4"
    rank: int = 32
    search: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS[1:])
        if self.rank < RANK_STEP or self.rank % RANK_STEP:
            raise ValueError(
                f"rank is {self.rank}: the file format holds multiples of {RANK_STEP}, "
                f"for example 32 or 128"
            )
