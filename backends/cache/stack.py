"""Block forwards for the time of one model call: the first blocks run, the middle ones may not.

ComfyUI's own loop stays in charge, so ControlNet adds, patches and block indices are what they
are. A reused call's middle blocks hand their input on, and the last of them adds the residual.
When to reuse is the caller's business. Whatever is made here outlives its block, so none of it may
be in the memory that newer cores record for a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch

from ..architectures import Architecture, Binding, Stack, stack_blocks
from ..compiler import unrecorded
from ..forwards import forward_slot, overridden

Streams = tuple[torch.Tensor | None, ...]
NOTHING, FRESH, STORED = "nothing", "fresh", "stored"
Probe = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], torch.Tensor]


class Watch(Protocol):
    """Sees the streams of a call."""

    def enter(self, block: "StackBlock", streams: Streams) -> None: ...

    def leave(self, block: "StackBlock", streams: Streams) -> None: ...


@dataclass(frozen=True)
class StackBlock:
    """One block of the logical stack. joins: streams that make up its input, "" = the same ones."""

    module: torch.nn.Module
    binding: Binding
    stack: Stack
    joins: tuple[str, ...]
    is_last: bool  # of its list

    @property
    def main(self) -> int:
        """The stream that the change is measured on: the image, or the only one."""
        streams = self.binding.carry.streams
        return streams.index("img") if "img" in streams else 0


def logical_stack(network: torch.nn.Module, architecture: Architecture) -> tuple[StackBlock, ...]:
    """All lists of a network as one stack, in execution order; joins stand at the borders."""
    found: list[StackBlock] = []
    for stack in architecture.stacks:
        blocks = stack_blocks(network, stack)
        for index, block in enumerate(blocks):
            original = getattr(block, "_orig_mod", block)  # torch.compile's wrapper has no names
            joins = tuple(stack.joins.split(",")) if stack.joins and index == 0 and found else ()
            is_last = index == len(blocks) - 1
            found.append(StackBlock(block, Binding(original, stack.carry), stack, joins, is_last))
    return tuple(found)


def join(block: StackBlock, names: tuple[str, ...], streams: Streams) -> Streams:
    """The streams of the blocks before, as `block` takes them."""
    if not block.joins:
        return streams
    parts = [streams[names.index(name)] for name in block.joins]
    return (torch.cat([part for part in parts if part is not None], dim=1),)


class StackOverride:
    """One model call over a logical stack.

    front: blocks that always run before the decision; last: index of the last block that may be
    skipped; reuse: the decision if it is known; decide(metric): asked once if it is not, behind
    block front - 1, or with None if those blocks were not called; observe(metric): gets the metric
    of a call decided before; probe: makes the metric from block 0's arguments instead (front 0);
    predict: the residual to add; add_at: the block that adds it; between: what the host adds
    between blocks, see below; watch: gets the streams in front of (enter) and behind (leave) every
    block that runs.

    between NOTHING: the residual is last minus first. FRESH (ControlNet): the host's adds do not
    depend on the stream, so they are made anew in every call and the residual is the sum of what
    each block changed. STORED (injectors that read the stream, which is stale in a reused call):
    the residual is last minus first, adds included, and is added to the first block's input.

    Afterwards: reuse; residual and stored_at of a computed call (None if it never got to `last`);
    applied: a reused call added its residual; blocks that ran and were skipped.
    """

    def __init__(
        self,
        blocks: tuple[StackBlock, ...],
        *,
        front: int,
        last: int,
        reuse: bool | None,
        decide: Callable[[torch.Tensor | None], bool],
        predict: Callable[[], Streams],
        observe: Callable[[torch.Tensor], None] | None = None,
        probe: Probe | None = None,
        add_at: int | None = None,
        between: str = NOTHING,
        watch: "Watch | None" = None,
    ):
        self.blocks, self.front, self.last = blocks, front, last
        self.reuse, self._decide, self._predict = reuse, decide, predict
        self._observe, self._probe = observe, probe
        self._add_at = last if add_at is None else add_at
        self._deltas, self._whole, self._watch = between == FRESH, between == STORED, watch
        # Clones, since blocks may write into their input: of the image, or of all streams if the
        # front blocks reach past a join.
        self._input: Streams | None = None
        self._joined = any(block.joins for block in blocks[1:front])
        self._before: tuple[int, Streams] | None = None
        self.residual: Streams | None = None
        self.stored_at: int | None = None
        self.applied = False
        self.num_computed = self.num_skipped = 0

    def __enter__(self) -> "StackOverride":
        modules = [block.module for block in self.blocks]
        forwards = [
            (module, partial(self._call, i, getattr(module, forward_slot(module))))
            for i, module in enumerate(modules)
        ]
        self._scope = overridden(forwards)
        self._scope.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._input = self._before = None
        self._scope.__exit__(kind, error, trace)

    def _call(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        binding = self.blocks[i].binding
        if i == 0:
            with unrecorded():
                self._open(args, kwargs)
        if i >= self.front and self.reuse is None:
            self.reuse = self._decide(None)
        if self.front <= i <= self.last:
            if self.reuse:
                with unrecorded():
                    return self._skip(i, args, kwargs)
            return self._compute(i, forward, args, kwargs)
        output = self._run(i, forward, args, kwargs)
        if i == self.front - 1 and self._input is not None:
            with unrecorded():
                self._measured(self._front_residual(i, binding.outputs(output)))
        return output

    def _run(
        self, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.num_computed += 1
        if self._watch is None:
            return forward(*args, **kwargs)
        block = self.blocks[i]
        with unrecorded():
            self._watch.enter(block, block.binding.read(args, kwargs))
        output = forward(*args, **kwargs)
        with unrecorded():
            self._watch.leave(block, block.binding.outputs(output))
        return output

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.reuse is not None and self._observe is None:
            return
        block = self.blocks[0]
        if self._probe is not None:
            self._measured(self._probe(block.module, args, kwargs))
        elif self.front > 0:
            streams = block.binding.read(args, kwargs)
            self._input = tuple(
                _clone(x) if self._joined or n == block.main else None
                for n, x in enumerate(streams)
            )

    def _front_residual(self, i: int, outputs: Streams) -> torch.Tensor:
        """What blocks 0 to `i` added to the image (behind a join: to everything)."""
        assert self._input is not None
        before = self._carried(0, i, self._input)[self.blocks[i].main]
        after = outputs[self.blocks[i].main]
        self._input = None
        assert before is not None
        assert after is not None
        return before.neg_().add_(after)

    def _measured(self, metric: torch.Tensor) -> None:
        if self.reuse is None:
            self.reuse = self._decide(metric)
        if self._observe is not None:
            self._observe(metric)

    def _skip(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.num_skipped += 1
        block = self.blocks[i]
        streams = block.binding.read(args, kwargs)
        if self._whole and self._before is None:
            self._before = (i, tuple(_clone(x) for x in streams))
        if i == self._add_at:
            if self._whole and self._before is not None:
                streams = self._carried(self._before[0], i, self._before[1])
            streams = tuple(
                x if r is None or x is None else x + r
                for x, r in zip(streams, self._predict(), strict=True)
            )
            self.applied = True
        return block.binding.result(_without_dropped(block, streams))

    def _compute(
        self, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        block = self.blocks[i]
        if self._deltas or self._before is None:
            with unrecorded():
                before = tuple(_clone(x) for x in block.binding.read(args, kwargs))
            if not self._deltas:
                self._before = (i, before)
        output = self._run(i, forward, args, kwargs)
        with unrecorded():
            if self._deltas:
                self._add_delta(i, _difference(block.binding.outputs(output), before))
            elif i == self.last and self._before is not None:
                start, before = self._before
                before = self._carried(start, i, before)
                self.residual = _difference(block.binding.outputs(output), before)
                self.stored_at, self._before = i, None
        return output

    def _add_delta(self, i: int, delta: Streams) -> None:
        if self.residual is not None and self.stored_at is not None:
            so_far = self._carried(self.stored_at, i, self.residual)
            delta = tuple(
                None if x is None else x if y is None else y.add_(x)
                for x, y in zip(delta, so_far, strict=True)
            )
        self.residual, self.stored_at = delta, i

    def _carried(self, start: int, stop: int, streams: Streams) -> Streams:
        """Streams as block `start` has them, in the form of block `stop`."""
        names = self.blocks[start].binding.carry.streams
        for block in self.blocks[start + 1 : stop + 1]:
            streams, names = join(block, names, streams), block.binding.carry.streams
        return streams


def _clone(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.clone()


def _difference(after: Streams, before: Streams) -> Streams:
    """after - before, in the storage of `before`; None where a stream ends."""
    return tuple(
        None if a is None or b is None else b.neg_().add_(a)
        for a, b in zip(after, before, strict=True)
    )


def _without_dropped(block: StackBlock, streams: Streams) -> Streams:
    """The streams that the block returns: the last one of a list may end some of them."""
    carry = block.binding.carry
    if not (block.is_last and carry.dropped):
        return streams
    return tuple(
        None if name in carry.dropped else x for name, x in zip(carry.streams, streams, strict=True)
    )
