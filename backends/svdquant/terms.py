"""What patches add to a quantised layer's output: low-rank pairs, Kronecker products, deltas.

W' = out * W * in + sum of terms; `out` and `in` are factors per row and column. All exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .casts import narrowed
from .kernels.base import LowRank


@dataclass(frozen=True)
class Kron:
    """kron(left [a, b], right [c, d]) on the rows and columns from `row` and `column` on."""

    left: torch.Tensor
    right: torch.Tensor
    row: int = 0
    column: int = 0

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds this term's output for x [M, K] to y [M, N]."""
        (a, b), (c, d) = self.left.shape, self.right.shape
        inner = x[:, self.column : self.column + b * d].reshape(-1, b, d) @ self.right.t()
        y[:, self.row : self.row + a * c] += (self.left @ inner).reshape(-1, a * c)

    def dense(self) -> "Dense":
        return Dense(torch.kron(self.left, self.right), self.row, self.column)


@dataclass(frozen=True)
class Dense:
    """A delta [n, k] on the rows and columns from `row` and `column` on."""

    matrix: torch.Tensor
    row: int = 0
    column: int = 0

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds this term's output for x [M, K] to y [M, N]."""
        num_rows, num_columns = self.matrix.shape
        part = x[:, self.column : self.column + num_columns] @ self.matrix.t()
        y[:, self.row : self.row + num_rows] += part

    def dense(self) -> "Dense":
        return self


@dataclass(frozen=True)
class Terms:
    """What patches add to a layer. pair: down [K, r], up [N, r]; the factors: [N] and [K].

    out_bias: with out_factor, what an unsigned layer's shifted input needs [N]: the file's bias
    takes the shift out of the unscaled output only.
    """

    pair: LowRank | None = None
    others: tuple[Kron | Dense, ...] = ()
    out_factor: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    in_factor: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Terms":
        """The same on a device and in a dtype."""
        moved = _mapped(
            self, lambda t: narrowed(t, dtype or t.dtype).to(device=device, non_blocking=True)
        )
        assert isinstance(moved, Terms)
        return moved


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with `change` applied to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, LowRank):
        return LowRank(change(value.down), change(value.up))
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if isinstance(value, (Terms, Kron, Dense)):
        names = value.__dataclass_fields__
        return replace(value, **{n: _mapped(getattr(value, n), change) for n in names})
    return value
