"""The vocabulary of token plans: what sequence parallel must know about a model family, as data.

A plan says which arguments of which blocks carry tokens and along which dim, in what order self
attention sees the streams, and where the whole sequence is needed again. Paths are globs over
module names, one component per dot. `cut` functions take the call's Shards (parallel/shards.py)
and the value; they compute on positions and touch tensors only by slicing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Streams = tuple[str, ...]
Name = str | int  # a forward parameter, or the position of one behind *args


class Shards(Protocol):
    """What a plan's functions may ask about the current call."""

    rank: int
    full: dict[str, int]
    replicated: set[str]
    parts: dict[str, tuple[int, ...]]
    memo: dict[str, Any]

    def define(self, stream: str, length: int, *, parts: Sequence[int] | None = None) -> None: ...

    def replicate(self, stream: str, length: int) -> None: ...

    def offset(self, stream: str) -> int: ...

    def local(self, streams: Streams) -> int: ...

    def total(self, streams: Streams) -> int: ...

    def positions(self, streams: Streams) -> list[int]: ...

    def cut(self, value: Any, dim: int, streams: Streams) -> Any: ...


@dataclass(frozen=True)
class Tok:
    """A value that carries the tokens of `streams`, in this order, along `dim`.

    fn(shards, value) replaces the slicing for anything that is not a plain tensor.
    """

    dim: int = 1
    streams: Streams = ("x",)
    fn: Callable[[Shards, Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks that run on local tokens.

    args: forward parameter -> what it carries; full values are cut, local ones and length 1 pass.
    layout: the order in which self attention sees the streams; other_layouts: orders it may use
    besides, told apart by length. define: the arguments whose length defines their stream at the
    first block; enter(shards, get): the same by hand, before every block. attention: exchanged
    attention calls that one block may make (a block that bypasses the hook would be wrong).
    optional: the class has these blocks in some checkpoints only.
    """

    path: str
    layout: Streams
    args: Mapping[Name, Tok]
    define: tuple[Name, ...] = ()
    enter: Callable[[Shards, Callable[[Name], Any]], None] | None = None
    other_layouts: tuple[Streams, ...] = ()
    attention: tuple[int, ...] = (1,)
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Gather:
    """A module behind the blocks whose `args` must be whole again; sequence parallel ends here."""

    path: str
    args: Mapping[Name, Tok]


@dataclass(frozen=True, kw_only=True)
class GatherOut:
    """The output of the last module that matches must be whole; index: of a tuple's element."""

    path: str
    tok: Tok
    index: int | None = None


@dataclass(frozen=True, kw_only=True)
class Island:
    """A module between blocks that needs the whole sequence: args gathered, its output cut."""

    path: str
    args: Mapping[Name, Tok]
    out: Tok | None = None
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """Everything that sequence parallel needs to know about one class of networks.

    end: where the sequence is whole again; local_attention: modules whose attention needs no
    exchange (queries local, keys whole); attention_layouts: modules whose queries and keys carry
    different streams; replicate: streams that every rank keeps whole; control: ControlNet
    residual lists that are cut, name -> Tok; heads: attribute path of the head count; rebuilt:
    arguments ("name" or "name.key") that the network makes itself when they are left out;
    refuse(arguments, options): why a call cannot be shared, or None; variant(arguments): another
    plan for calls with these arguments, or None.
    """

    blocks: tuple[Blocks, ...]
    end: Gather | GatherOut
    islands: tuple[Island, ...] = ()
    local_attention: tuple[str, ...] = ()
    attention_layouts: Mapping[str, tuple[Streams, Streams]] = field(default_factory=dict)
    replicate: Streams = ()
    control: Mapping[str, Tok] = field(default_factory=dict)
    heads: str = "num_heads"
    rebuilt: tuple[str, ...] = ()
    refuse: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] | None = None
    variant: Callable[[Mapping[str, Any]], "TokenPlan | None"] | None = None

    def for_call(self, arguments: Mapping[str, Any]) -> "TokenPlan":
        """The plan for a call of the network with these arguments, by parameter name."""
        other = self.variant(arguments) if self.variant is not None else None
        return self if other is None else other


def ranges(*streams: str, keep: int | None = None) -> Tok:
    """A list of (start, stop, row, ...) over these streams, start and stop counted over all.

    Rows that are tensors with one entry per token of their range are cut with it. keep: how many
    elements of each entry stay (None: all).
    """

    def cut(shards: Shards, value: Any) -> Any:
        found = []
        local_base = full_base = 0
        for stream in streams:
            count = shards.parts[stream][shards.rank]
            low = full_base + shards.offset(stream)
            for start, stop, *rows in value:
                stop = shards.total(streams) if stop is None else stop
                first, last = max(start, low), min(stop, low + count)
                if first >= last:
                    continue
                kept = [
                    row[first - start : last - start] if _per_token(row, stop - start) else row
                    for row in rows
                ]
                entry = (first - low + local_base, last - low + local_base, *kept)
                found.append(entry[:keep])
            local_base += count
            full_base += shards.full[stream]
        return found

    return Tok(streams=streams, fn=cut)


def _per_token(row: Any, length: int) -> bool:
    return getattr(row, "ndim", 0) == 1 and row.shape[0] == length


def boundary(*streams: str) -> Tok:
    """An int that says where a second part of the sequence starts: counted in local tokens."""

    def cut(shards: Shards, value: Any) -> Any:
        return sum(1 for position in shards.positions(streams) if position < value)

    return Tok(streams=streams, fn=cut)
