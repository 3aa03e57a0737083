"""ComfyUI's weight patches on a quantised layer, as terms that are added to its output.

A 4-bit weight is never rewritten: W' = out * W * in + sum of terms, where `out` and `in` are
factors per row and column (DoRA) and terms are low-rank pairs, Kronecker products (LoKr) or dense
deltas. Strengths enter the terms exactly; without patches the layer computes what it did before.
Patches are ComfyUI's tuples (strength, value, strength_model, offset, function), 0.33.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import SlipstreamError
from .kernels.base import LowRank
from .terms import Dense, Kron, Terms
from .weight import QuantWeight, effective, unsigned_output

RANK_STEP = 16
_MAX_EXACT_RANK = 256  # a LoHa of higher rank is kept as a dense delta
MERGE = (  # conflicts.py says the same before sampling starts
    "A model merge scales the weights of a quantised layer, which 4-bit weights cannot do. "
    "Merge the 16-bit models first and convert the result, or remove the merge."
)


class UnsupportedPatchError(SlipstreamError):
    """A patch type that has no exact form here; the text is its name for the user."""


@dataclass
class _Draft:
    """The terms while patches are applied one after the other, in fp32."""

    weight: QuantWeight
    pairs: list[LowRank] = field(default_factory=list)
    others: list[Kron | Dense] = field(default_factory=list)
    out_factor: torch.Tensor | None = None
    in_factor: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.segments[0].q.device

    def current(self, rows: slice) -> torch.Tensor:
        """Rows of the dense weight after the patches so far."""
        dense = effective(self.weight, rows)
        start, stop, _ = rows.indices(self.weight.shape[0])
        if self.in_factor is not None:
            dense *= self.in_factor
        if self.out_factor is not None:
            dense *= self.out_factor[start:stop].unsqueeze(1)
        for down, up in self.pairs:
            dense += up[start:stop] @ down.t()
        for term in (t.dense() for t in self.others):
            low = max(start, term.row)
            high = min(stop, term.row + term.matrix.shape[0])
            if low < high:
                columns = slice(term.column, term.column + term.matrix.shape[1])
                dense[low - start : high - start, columns] += term.matrix[
                    low - term.row : high - term.row
                ]
        return dense

    def scale_rows(self, factor: torch.Tensor) -> None:
        """W := factor [N] * W."""
        self.out_factor = factor if self.out_factor is None else self.out_factor * factor
        self.pairs = [LowRank(down, up * factor.unsqueeze(1)) for down, up in self.pairs]
        self.others = [
            replace(t, matrix=t.matrix * factor[t.row : t.row + t.matrix.shape[0]].unsqueeze(1))
            for t in (other.dense() for other in self.others)
        ]

    def scale_columns(self, factor: torch.Tensor) -> None:
        """W := W * factor [K]."""
        self.in_factor = factor if self.in_factor is None else self.in_factor * factor
        self.pairs = [LowRank(down * factor.unsqueeze(1), up) for down, up in self.pairs]
        self.others = [
            replace(t, matrix=t.matrix * factor[t.column : t.column + t.matrix.shape[1]])
            for t in (other.dense() for other in self.others)
        ]


Patch = tuple[Any, ...]


def compile_terms(
    patches: Sequence[Patch], weight: QuantWeight
) -> tuple[Terms | None, tuple[str, ...]]:
    """The fp32 terms of a layer's patches (None if nothing is left), and the types refused.

    Raises ValueError for a patch that scales the base weight (a model merge).
    """
    draft, refused = _Draft(weight), []
    for patch in patches:
        strength, value, strength_model, offset, function = patch
        if strength_model != 1.0:
            raise ValueError(MERGE)
        if strength == 0:
            continue
        try:
            if function is not None:
                raise UnsupportedPatchError("a LoRA that reorders rows")
            _apply(draft, float(strength), value, offset)
        except UnsupportedPatchError as error:
            refused.append(str(error))
    return _finished(draft), tuple(refused)


def refused_types(patches: Iterable[Patch]) -> tuple[str, ...]:
    """The types among `patches` that cannot be applied, without computing anything."""
    found = []
    for strength, value, _, _, function in patches:
        if strength == 0:
            continue
        if function is not None:
            found.append("a LoRA that reorders rows")
        try:
            _kind(value)
        except UnsupportedPatchError as error:
            found.append(str(error))
    return tuple(found)


def _finished(draft: _Draft) -> Terms | None:
    factors = (draft.out_factor, draft.in_factor)
    if not draft.pairs and not draft.others and factors == (None, None):
        return None
    pair = None
    if draft.pairs:
        down = torch.cat([p.down for p in draft.pairs], 1)
        up = torch.cat([p.up for p in draft.pairs], 1)
        pad = (0, -down.shape[1] % RANK_STEP)
        pair = LowRank(*(torch.nn.functional.pad(t, pad).contiguous() for t in (down, up)))
    out_bias = None
    if draft.out_factor is not None:
        out_bias = (1 - draft.out_factor) * unsigned_output(draft.weight)
    return Terms(pair, tuple(draft.others), draft.out_factor, out_bias, draft.in_factor)


# ---- patch types ----
def _kind(value: Any) -> str:
    """lora, loha, lokr or diff. Raises UnsupportedPatchError with the type's name."""
    if isinstance(value, list):
        raise UnsupportedPatchError("a model merge (another model's weights)")
    name = getattr(value, "name", None)
    if name is not None:
        return _adapter_kind(str(name), value.weights)
    if len(value) == 1:
        return "diff"
    if value[0] != "diff":
        raise UnsupportedPatchError(str(value[0]))
    if len(value[1]) > 1:
        raise UnsupportedPatchError("diff with padding")
    return "diff"


def _adapter_kind(name: str, weights: Sequence[Any]) -> str:
    if name not in ("lora", "loha", "lokr"):
        raise UnsupportedPatchError(name)
    if name == "lora" and weights[5] is not None:
        raise UnsupportedPatchError("a LoRA that resizes the layer")
    tucker = {"lora": (3,), "loha": (5, 6), "lokr": (7,)}[name]
    if any(weights[i] is not None for i in tucker):
        raise UnsupportedPatchError(f"{name} with a Tucker core")
    return name


def _apply(draft: _Draft, strength: float, value: Any, offset: Any) -> None:
    kind = _kind(value)
    num_rows, num_columns = draft.weight.shape
    dim, start, length = offset if offset is not None else (0, 0, num_rows)
    if dim not in (0, 1):
        raise UnsupportedPatchError(f"an offset in dimension {dim}")
    row, column = (start, 0) if dim == 0 else (0, start)
    shape = (length, num_columns) if dim == 0 else (num_rows, length)
    if kind == "diff":
        matrix = (value[0] if len(value) == 1 else value[1][0]).to(draft.device, torch.float32)
        if tuple(matrix.shape) != shape:
            raise UnsupportedPatchError(
                f"diff of shape {list(matrix.shape)} for a layer {list(shape)}"
            )
        draft.others.append(Dense(matrix * strength, row, column))
        return
    build = {"lora": _lora, "loha": _loha, "lokr": _lokr}[kind]
    weights = [w.to(draft.device) if isinstance(w, torch.Tensor) else w for w in value.weights]
    term, dora = build(weights, shape)
    if dora is not None:
        _dora(draft, strength, term, dora.float(), row, column, shape)
    else:
        _add(draft, term, strength, row, column)


Term = LowRank | Kron | Dense


def _add(draft: _Draft, term: Term, strength: float, row: int, column: int) -> None:
    if isinstance(term, LowRank):
        num_rows, num_columns = draft.weight.shape
        after_k = num_columns - column - term.down.shape[0]
        after_n = num_rows - row - term.up.shape[0]
        pad = torch.nn.functional.pad
        down = pad(term.down, (0, 0, column, after_k))
        draft.pairs.append(LowRank(down, pad(term.up * strength, (0, 0, row, after_n))))
    elif isinstance(term, Kron):
        draft.others.append(Kron(term.left * strength, term.right, row, column))
    else:
        draft.others.append(Dense(term.matrix * strength, row, column))


def _lora(weights: Sequence[Any], shape: tuple[int, int]) -> tuple[Term, torch.Tensor | None]:
    up, down = (w.float().flatten(start_dim=1) for w in weights[:2])
    alpha = 1.0 if weights[2] is None else float(weights[2]) / down.shape[0]
    _check("lora", (up.shape[0], down.shape[1]), shape)
    return LowRank(down.t().contiguous(), up * alpha), weights[4]


def _loha(weights: Sequence[Any], shape: tuple[int, int]) -> tuple[Term, torch.Tensor | None]:
    a1, b1, a2, b2 = (weights[i].float() for i in (0, 1, 3, 4))
    alpha = 1.0 if weights[2] is None else float(weights[2]) / b1.shape[0]
    _check("loha", (a1.shape[0], b1.shape[1]), shape)
    rank = b1.shape[0] * b2.shape[0]
    if rank > min(_MAX_EXACT_RANK, *shape):
        return Dense((a1 @ b1) * (a2 @ b2) * alpha), weights[7]
    # (A1 B1) * (A2 B2) is exactly the product of the row-wise Kronecker products
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1) * alpha
    down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    return LowRank(down.t().contiguous(), up), weights[7]


def _lokr(weights: Sequence[Any], shape: tuple[int, int]) -> tuple[Term, torch.Tensor | None]:
    rank = None
    left, right = weights[0], weights[1]
    if left is None:
        rank, left = weights[4].shape[0], weights[3].float() @ weights[4].float()
    if right is None:
        rank, right = weights[6].shape[0], weights[5].float() @ weights[6].float()
    alpha = 1.0 if weights[2] is None or rank is None else float(weights[2]) / rank
    if left.dim() != 2 or right.dim() != 2:
        raise UnsupportedPatchError("lokr of a convolution")
    left, right = left.float() * alpha, right.float()
    _check("lokr", (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]), shape)
    return Kron(left, right), weights[8]


def _check(kind: str, got: tuple[int, int], wanted: tuple[int, int]) -> None:
    if got != wanted:
        raise UnsupportedPatchError(f"{kind} of shape {list(got)} for a layer {list(wanted)}")


def _dora(
    draft: _Draft,
    strength: float,
    term: Term,
    dora: torch.Tensor,
    row: int,
    column: int,
    shape: tuple[int, int],
) -> None:
    """W := (1 - s) W + s f (W + diff), f = dora / norm, as ComfyUI 0.33 defines the norms."""
    num_rows, num_columns = draft.weight.shape
    eps = torch.finfo(torch.float32).eps
    if dora.shape[0] == shape[0]:
        norms = _row_norms(draft, row, shape[0], slice(column, column + shape[1]))
        factor = dora.reshape(-1) / (norms + eps)
        if shape[1] != num_columns:
            raise UnsupportedPatchError("DoRA on a part of the columns")
        whole = torch.ones(num_rows, device=draft.device)
        whole[row : row + shape[0]] = 1 - strength + strength * factor
        draft.scale_rows(whole)
        _add(draft, _scaled(term, rows=factor), strength, row, column)
        return
    if shape[0] != num_rows:
        raise UnsupportedPatchError("DoRA per input channel on a part of the rows")
    trial = _Draft(draft.weight, [*draft.pairs], [*draft.others], draft.out_factor, draft.in_factor)
    _add(trial, term, 1.0, row, column)
    squares = torch.zeros(num_columns, device=draft.device)
    for start in range(0, num_rows, 1024):
        squares += trial.current(slice(start, min(start + 1024, num_rows))).square().sum(0)
    factor = dora.reshape(-1) / (squares.sqrt()[column : column + shape[1]] + eps)
    whole = torch.ones(num_columns, device=draft.device)
    whole[column : column + shape[1]] = 1 - strength + strength * factor
    draft.scale_columns(whole)
    _add(draft, _scaled(term, columns=factor), strength, row, column)


def _row_norms(draft: _Draft, row: int, num_rows: int, columns: slice) -> torch.Tensor:
    """Norms of some rows of the weight as it is so far, 1024 rows at a time."""
    starts = range(row, row + num_rows, 1024)
    parts = [draft.current(slice(s, min(s + 1024, row + num_rows)))[:, columns] for s in starts]
    return torch.cat([part.norm(dim=1) for part in parts])


def _scaled(
    term: Term, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> Term:
    """The term's matrix times a factor per row or per column."""
    if isinstance(term, LowRank):
        down = term.down if columns is None else term.down * columns.unsqueeze(1)
        return LowRank(down, term.up if rows is None else term.up * rows.unsqueeze(1))
    matrix = term.dense().matrix
    if rows is not None:
        matrix = matrix * rows.unsqueeze(1)
    return Dense(matrix if columns is None else matrix * columns)
