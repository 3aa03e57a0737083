"""Pure decisions: which steps and blocks stay exact, which kernels a policy may try, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..position import Position
from .config import AUTO, AttentionConfig, parse_blocks
from .kernels.base import APPROXIMATE, EXACT, Kernel
from .request import BlockKey, Request

SCHEDULED_STEP = "This step is scheduled for exact kernels (dense_first_steps, dense_last_steps)"
DENSE_STEPS, FEW_STEPS = 1, 10  # AUTO: this many at either end, none of fewer steps than that
SCHEDULED_BLOCK = "This block is listed in dense_blocks: exact kernels only"
ON_CPU = "The model runs on {}: attention kernels need a CUDA or ROCm GPU"


@dataclass(frozen=True)
class BlockNumbers:
    """Numbers blocks over all stacks in execution order. starts: block type -> first number.

    Empty where the blocks are not known, or are levels of a U-Net: each counts by its own index.
    """

    starts: Mapping[str, int]

    def number(self, key: BlockKey) -> int | None:
        """The number `dense_blocks` means; None for a block that is in no stack (a refiner's)."""
        if key.block_type == "call":
            return key.ordinal if not self.starts else None
        if not self.starts:
            return key.block_index
        start = self.starts.get(key.block_type)
        return None if start is None else start + key.block_index


class Schedule:
    """Where only exact kernels run: steps at either end of the whole schedule, and blocks."""

    def __init__(self, config: AttentionConfig, numbers: BlockNumbers, position: Position):
        auto = DENSE_STEPS if position.whole >= FEW_STEPS else 0
        first, last = config.dense_first_steps, config.dense_last_steps
        self._first = auto if first == AUTO else first
        self._last = auto if last == AUTO else last
        self._position = position
        self._blocks, self._numbers = parse_blocks(config.dense_blocks), numbers

    def dense_step(self, step: int) -> bool:
        position = self._position
        return position.from_start(step) < self._first or position.from_end(step) < self._last

    def sentence(self) -> str:
        """'steps 0 and 19 exact by schedule', or ''."""
        dense = [i for i in range(self._position.num_steps) if self.dense_step(i)]
        if not dense:
            return ""
        if len(dense) == self._position.num_steps:
            return "all steps exact by schedule"
        runs = [i for i in dense if i - 1 not in dense]
        parts = []
        for start in runs:
            end = start
            while end + 1 in dense:
                end += 1
            parts.append(f"{start}" if start == end else f"{start}-{end}")
        word = "step" if len(dense) == 1 else "steps"
        return f"{word} {' and '.join(parts)} exact by schedule"

    def dense_block(self, key: BlockKey) -> bool:
        return bool(self._blocks) and self._numbers.number(key) in self._blocks


@dataclass(frozen=True)
class Candidates:
    """Kernels to try for one call, best first, and why the policy left the others out."""

    approximate: tuple[Kernel, ...]
    exact: tuple[Kernel, ...]
    reasons: dict[str, str]


def order(
    config: AttentionConfig, kernels: Mapping[str, Kernel], policies: Mapping[str, Sequence[str]]
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """(approximate, exact) kernels that the policy of `config` may try, best guess first."""
    exact = tuple(kernels[n] for n in policies["exact"] if n in kernels)
    assert all(k.category == EXACT for k in exact)
    if config.policy == "manual":
        kernel = kernels[config.backend]
        # Beside an approximate kernel: for calls that are to be exact where the default is not.
        return ((kernel,), exact) if kernel.category == APPROXIMATE else ((), (kernel,))
    names = [n for n in policies[config.policy] if n in kernels]
    return tuple(kernels[n] for n in names if kernels[n].category == APPROXIMATE), exact


def closed(
    config: AttentionConfig, request: Request, *, dense_step: bool, dense_block: bool
) -> str | None:
    """Why approximate kernels may not be tried for this call, or None."""
    if dense_step:
        return SCHEDULED_STEP
    if dense_block:
        return SCHEDULED_BLOCK
    if max(request.q_tokens, request.k_tokens) < config.min_tokens:
        return f"Calls under min_tokens ({config.min_tokens}) stay exact"
    return None
