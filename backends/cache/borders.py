"""Whether each block's input is what the block before returned: seen once per run, in a full call.

The architecture data says how lists of blocks join and whether the host adds something between
blocks. This check catches what the data cannot know: another pack that writes between blocks, or
a ComfyUI whose loop has changed.
"""

import torch

from .stack import StackBlock, Streams, join


class BorderCheck:
    """Fed with the streams in front of and behind every block of one call, in order."""

    def __init__(self) -> None:
        self._previous: tuple[StackBlock, Streams] | None = None
        self._changed: torch.Tensor | None = None
        self._joins_changed: torch.Tensor | None = None
        self.reshaped: str | None = None  # block type whose input has another shape

    def enter(self, block: StackBlock, streams: Streams) -> None:
        """The input of a block, before it runs."""
        if self._previous is None:
            return
        before, outputs = self._previous
        carry = block.binding.carry
        if block.joins and before.binding.carry.tails:
            return
        expected = join(block, before.binding.carry.streams, outputs)
        for name, want, got in zip(carry.streams, expected, streams, strict=True):
            if want is None or got is None or name in carry.tails:
                continue
            if want.shape != got.shape:
                self.reshaped = block.stack.block_type
                continue
            differs = (want != got).any()
            if block.joins:
                self._joins_changed = _either(self._joins_changed, differs)
            else:
                self._changed = _either(self._changed, differs)

    def leave(self, block: StackBlock, streams: Streams) -> None:
        """The output of a block; kept as a clone, since the host may write into it."""
        self._previous = block, tuple(None if x is None else x.clone() for x in streams)

    def close(self) -> tuple[bool, bool]:
        """(something is added between blocks, the input of a joined list is not the join)."""
        self._previous = None
        changed, joins = self._changed, self._joins_changed
        self._changed = self._joins_changed = None
        return changed is not None and bool(changed), joins is not None and bool(joins)


def _either(flag: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if flag is None else flag | more
