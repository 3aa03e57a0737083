"""How one call's tokens lie on the ranks, in integers only: lengths, parts, orders.

A stream (text, image, ...) is split evenly over the ranks without padding, or replicated when it
is shorter than the world. A layout is an order of streams; `arrange` says in which order tokens
of a layout arrive after an exchange, and how to put them into canonical order (all tokens of the
first stream, then of the second, ...), so that masks and sparse kernels stay valid.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..backends.errors import SlipstreamError

Streams = tuple[str, ...]
Span = tuple[int, int]  # start, length


class PlanError(SlipstreamError, RuntimeError):
    """The live model does not do what its token plan says: this call must run on one device."""


def even_split(length: int, num_parts: int) -> tuple[int, ...]:
    """Lengths of `num_parts` parts; the first ones are one longer where it does not divide."""
    base, rest = divmod(length, num_parts)
    return tuple(base + (part < rest) for part in range(num_parts))


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same spans with neighbours merged and empty ones left out."""
    found: list[Span] = []
    for start, length in spans:
        if not length:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return tuple(found)


class Shards:
    """Lengths and parts of every stream of one call, as rank `rank` of `world` sees them.

    memo: anything a plan's functions keep for the call.
    """

    def __init__(self, *, rank: int, world: int, replicate: Iterable[str] = ()):
        self.rank, self.world = rank, world
        self.full: dict[str, int] = {}
        self.parts: dict[str, tuple[int, ...]] = {}
        self.replicated: set[str] = set()
        self.memo: dict[str, Any] = {}
        self.version = 0  # counts redefinitions: what was derived from older lengths is void
        self._always_replicated = frozenset(replicate)

    def define(self, stream: str, length: int, *, parts: Sequence[int] | None = None) -> None:
        """Set a stream's length; `parts` other than an even split must add up to it."""
        assert parts is None or sum(parts) == length
        self.version += 1
        self.full[stream] = length
        # Blocks of some models fail on a shard without tokens.
        if parts is None and (length < self.world or stream in self._always_replicated):
            self.replicate(stream, length)
        else:
            self.replicated.discard(stream)
            split = even_split(length, self.world) if parts is None else parts
            self.parts[stream] = tuple(split)

    def replicate(self, stream: str, length: int) -> None:
        """Set the length of a stream that every rank keeps whole."""
        self.version += 1
        self.full[stream] = length
        self.replicated.add(stream)
        self.parts[stream] = (length,) * self.world

    def local(self, streams: Streams) -> int:
        """Tokens of these streams on this rank."""
        return sum(self.parts[s][self.rank] for s in streams)

    def total(self, streams: Streams) -> int:
        """Tokens of these streams in all."""
        return sum(self.full[s] for s in streams)

    def offset(self, stream: str, rank: int | None = None) -> int:
        """Where a rank's part of the stream starts."""
        if stream in self.replicated:
            return 0
        return sum(self.parts[stream][: self.rank if rank is None else rank])

    def local_spans(self, streams: Streams, rank: int | None = None) -> list[Span]:
        """A rank's tokens as spans of the canonical order of these streams, one per stream."""
        rank = self.rank if rank is None else rank
        bases = accumulate((self.full[s] for s in streams), initial=0)
        return [
            (base + self.offset(s, rank), self.parts[s][rank])
            for s, base in zip(streams, bases, strict=False)
        ]

    def positions(self, streams: Streams) -> list[int]:
        """Canonical positions of this rank's tokens."""
        spans = self.local_spans(streams)
        return [p for start, length in spans for p in range(start, start + length)]

    def cut(self, value: Any, dim: int, streams: Streams) -> Any:
        """This rank's tokens of a whole tensor. Views where they are one run of tokens."""
        return pick(value, dim, joined(self.local_spans(streams)))


def pick(value: Any, dim: int, spans: Sequence[Span]) -> Any:
    """The given spans of a tensor along `dim`, one after the other."""
    if not spans:
        return value.narrow(dim, 0, 0)
    parts = [value.narrow(dim, start, length) for start, length in spans]
    if len(parts) == 1:
        return parts[0]
    import torch

    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Arrangement:
    """One layout on ulysses x ring ranks; rank r is number r % ulysses of ring chunk r // ulysses.

    segments: (length, is replicated) of each stream in this rank's local tensor; rows: sharded
    tokens of every rank; chunks: canonical spans of each ring chunk's sharded tokens in the order
    in which they arrive; replicated: canonical spans of the tokens that every rank has.
    """

    segments: tuple[tuple[int, bool], ...]
    rows: tuple[int, ...]
    chunks: tuple[tuple[Span, ...], ...]
    replicated: tuple[Span, ...]

    @cached_property
    def own(self) -> tuple[Span, ...]:
        """Spans of this rank's local tensor that are sharded."""
        return self._local_spans(is_replicated=False)

    @cached_property
    def extra(self) -> tuple[Span, ...]:
        """Spans of this rank's local tensor that every rank has."""
        return self._local_spans(is_replicated=True)

    def _local_spans(self, *, is_replicated: bool) -> tuple[Span, ...]:
        starts = accumulate((length for length, _ in self.segments), initial=0)
        return joined(
            (start, length)
            for (length, replicated), start in zip(self.segments, starts, strict=False)
            if replicated == is_replicated
        )

    @cached_property
    def num_replicated(self) -> int:
        return sum(length for _, length in self.replicated)

    @cached_property
    def gathered(self) -> tuple[Span, ...]:
        """Canonical spans in the order of all chunks, then the replicated tokens."""
        return joined([span for chunk in self.chunks for span in chunk] + list(self.replicated))

    @cached_property
    def to_canonical(self) -> tuple[Span, ...] | None:
        """Spans of the gathered order that make up the canonical order; None if it is the same."""
        starts = accumulate((length for _, length in self.gathered), initial=0)
        placed = sorted(
            (canonical, at, length)
            for (canonical, length), at in zip(self.gathered, starts, strict=False)
        )
        order = joined((at, length) for _, at, length in placed)
        return None if len(order) <= 1 else order

    def keys(self, chunk: int) -> tuple[Span, ...]:
        """Canonical spans of the keys that a ring chunk carries: replicated ones only once."""
        return self.chunks[chunk] + (self.replicated if chunk == 0 else ())

    def queries(self, chunk: int) -> tuple[Span, ...]:
        """Canonical spans of the queries that a ring chunk answers."""
        return self.chunks[chunk] + self.replicated


def arrange(shards: Shards, layout: Streams, *, ulysses: int, ring: int) -> Arrangement:
    """The Arrangement of `layout` for these shards; ulysses * ring must be the world."""
    assert ulysses * ring == shards.world
    is_sharded = [s not in shards.replicated for s in layout]

    def only(spans: list[Span], keep: Callable[[bool], bool]) -> list[Span]:
        return [span for span, sharded in zip(spans, is_sharded, strict=True) if keep(sharded)]

    spans = [shards.local_spans(layout, rank) for rank in range(shards.world)]
    sharded = [only(s, bool) for s in spans]
    chunks = tuple(
        joined(span for rank in range(c * ulysses, (c + 1) * ulysses) for span in sharded[rank])
        for c in range(ring)
    )
    return Arrangement(
        segments=tuple((shards.parts[s][shards.rank], s in shards.replicated) for s in layout),
        rows=tuple(sum(length for _, length in s) for s in sharded),
        chunks=chunks,
        replicated=joined(only(spans[shards.rank], lambda sharded: not sharded)),
    )
