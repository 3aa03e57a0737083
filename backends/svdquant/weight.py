"""A quantised weight in memory: segments over rows and columns of one Linear, in plain order.

y[:, rows] = sum over the column segments of
    int4:  Q(x / smooth [+ shift]) @ (codes * scale)^T + (x @ down) @ up^T
    nvfp4: the same with fp4 codes, fp8 group scales and a factor per row
    awq:   x @ ((codes - 8) * scale + zeros)^T
The low-rank branch reads x unsmoothed and unshifted. Storage is what comfy-kitchen's kernels take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from . import layouts

PARTS = ("q", "scale", "smooth", "down", "up", "rows", "zeros")
MAX_SEGMENTS = 4


@dataclass(frozen=True)
class Facts:
    """What a segment is, without tensors.

    precision: int4, nvfp4 or awq; row, column: where it starts in the weight; unsigned: its input
    is shifted before it is smoothed; shared: a number above 0 that all layers have which quantise
    the same input in the same way (q, k, v of one file layer), and how many they are.
    """

    precision: str
    row: int
    num_rows: int
    column: int
    num_columns: int
    unsigned: bool = False
    shared: int = 0
    num_sharing: int = 1


@dataclass(frozen=True)
class Segment:
    """One block of a weight. N, K: its rows and columns; R: rank.

    q: int8 [N, K/2] (low nibble first; nvfp4: uint8, high nibble first); scale: [K/64, N], for
    nvfp4 fp8 [N, K/16] in cuBLAS's blocked order; smooth [K]; down [K, R]; up [N, R]; rows: nvfp4
    factor per row [N], fp32; zeros: awq [K/64, N].
    """

    facts: Facts
    q: torch.Tensor
    scale: torch.Tensor
    smooth: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit (or fp32) dtype that this segment computes in."""
        return self.scale.dtype if self.smooth is None else self.smooth.dtype

    @property
    def num_bytes(self) -> int:
        tensors = (getattr(self, part) for part in PARTS)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class QuantWeight:
    """The segments of one Linear's weight, and the shape [N, K] that ComfyUI sees."""

    shape: tuple[int, int]
    segments: tuple[Segment, ...]

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)


def whole(segment: Segment) -> QuantWeight:
    """A weight of one segment."""
    return QuantWeight((segment.facts.num_rows, segment.facts.num_columns), (segment,))


def rows_of(segment: Segment, start: int, stop: int, *, shared: int, count: int) -> Segment:
    """Rows start..stop of a segment as a segment of its own; bit-equal to slicing its output."""
    facts = segment.facts
    if facts.precision == "nvfp4":
        plain = layouts.plain_from_blocked(segment.scale)[start:stop]
        scale = layouts.blocked_from_plain(plain)
    else:
        scale = segment.scale[:, start:stop].contiguous()
    return replace(
        segment,
        facts=replace(facts, row=0, num_rows=stop - start, shared=shared, num_sharing=count),
        q=segment.q[start:stop].contiguous(),
        scale=scale,
        up=None if segment.up is None else segment.up[start:stop].contiguous(),
        rows=None if segment.rows is None else segment.rows[start:stop].contiguous(),
        zeros=None if segment.zeros is None else segment.zeros[:, start:stop].contiguous(),
    )


def stack_rows(segments: Sequence[Segment]) -> QuantWeight:
    """Segments one below the other, fused to one where their inputs are quantised alike."""
    first = segments[0]
    num_columns = first.facts.num_columns
    num_rows = sum(s.facts.num_rows for s in segments)
    if all(_same_input(first, other) for other in segments[1:]):
        return whole(_fused_rows(segments))
    placed, row = [], 0
    for segment in segments:
        placed.append(replace(segment, facts=replace(segment.facts, row=row)))
        row += segment.facts.num_rows
    return QuantWeight((num_rows, num_columns), tuple(placed))


def stack_columns(segments: Sequence[Segment]) -> QuantWeight:
    """Segments side by side: each reads its own columns of the input, the outputs are added."""
    placed, column = [], 0
    for segment in segments:
        placed.append(replace(segment, facts=replace(segment.facts, column=column)))
        column += segment.facts.num_columns
    return QuantWeight((segments[0].facts.num_rows, column), tuple(placed))


def _same_input(a: Segment, b: Segment) -> bool:
    if a.smooth is None or b.smooth is None:
        return False
    return (
        a.facts.precision == b.facts.precision
        and a.facts.unsigned == b.facts.unsigned
        and torch.equal(a.smooth, b.smooth)
    )


def _fused_rows(segments: Sequence[Segment]) -> Segment:
    first = segments[0]
    is_fp4 = first.facts.precision == "nvfp4"
    downs = [s.down for s in segments if s.down is not None]
    ups = [s.up for s in segments if s.up is not None]
    factors = [s.rows for s in segments if s.rows is not None]
    assert len(downs) == len(ups) == len(segments)
    return replace(
        first,
        facts=replace(first.facts, num_rows=sum(s.facts.num_rows for s in segments)),
        q=torch.cat([s.q for s in segments]),
        scale=torch.cat([s.scale for s in segments], 0 if is_fp4 else 1),
        down=torch.cat(downs, 1),
        up=torch.block_diag(*ups),
        rows=torch.cat(factors) if factors else None,
    )


def residual(segment: Segment, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] of the 4-bit part alone, without smoothing and low-rank branch, in `dtype`.

    The weight that acts on x is residual / smooth + up @ down^T (awq: residual itself).
    """
    facts = segment.facts
    if facts.precision == "nvfp4":
        assert segment.rows is not None
        units = fp4_units(segment, dtype)
        return (units.float() * segment.rows.float().unsqueeze(1)).to(dtype)
    signed = facts.precision == "int4"
    codes = layouts.codes_from_plain(segment.q, signed=signed).to(dtype)
    groups = codes.view(facts.num_rows, -1, layouts.GROUP[facts.precision])
    scale = segment.scale.t().unsqueeze(-1).to(dtype)
    if signed:
        return (groups * scale).view(facts.num_rows, facts.num_columns)
    assert segment.zeros is not None
    zeros = segment.zeros.t().unsqueeze(-1).to(dtype)
    return ((groups - 8) * scale + zeros).view(facts.num_rows, facts.num_columns)


def fp4_units(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of an nvfp4 segment before the factor per row: exact in 16 bits."""
    codes = layouts.codes_from_plain(layouts.swap_nibbles(segment.q), signed=False)
    values = layouts.fp4_values(codes, dtype)
    scale = layouts.plain_from_blocked(segment.scale).to(dtype).unsqueeze(-1)
    groups = values.view(segment.facts.num_rows, -1, 16) * scale
    return groups.view(segment.facts.num_rows, segment.facts.num_columns)


def effective(weight: QuantWeight, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of the dense fp32 weight that acts on x: for tests, DoRA norms and error figures."""
    num_rows, num_columns = weight.shape
    start, stop, _ = rows.indices(num_rows)
    dense = torch.zeros(stop - start, num_columns, device=weight.segments[0].q.device)
    for segment in weight.segments:
        facts = segment.facts
        low, high = max(start, facts.row), min(stop, facts.row + facts.num_rows)
        if low >= high:
            continue
        part = residual(segment)[low - facts.row : high - facts.row]
        if segment.smooth is not None:
            part = part / segment.smooth.float()
        if segment.up is not None and segment.down is not None:
            up = segment.up[low - facts.row : high - facts.row].float()
            part = part + up @ segment.down.float().t()
        columns = slice(facts.column, facts.column + facts.num_columns)
        dense[low - start : high - start, columns] += part
    return dense


def unsigned_output(weight: QuantWeight) -> torch.Tensor:
    """fp32 [N]: what the shift of unsigned segments adds to the output (the bias takes it off)."""
    added = torch.zeros(weight.shape[0], device=weight.segments[0].q.device)
    for segment in weight.segments:
        facts = segment.facts
        if facts.unsigned:
            assert segment.smooth is not None
            rows = slice(facts.row, facts.row + facts.num_rows)
            added[rows] += (residual(segment) / segment.smooth.float()).sum(1)
    return added * layouts.UNSIGNED_SHIFT
