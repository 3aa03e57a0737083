"""Pure decisions: which steps and blocks stay exact, which kernels a policy may try, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config import AttentionConfig, parse_blocks
from .kernels.base import APPROXIMATE, EXACT, Kernel
from .request import BlockKey, Request

SCHEDULED_STEP = "This step is scheduled for exact kernels (dense_first_steps, dense_last_steps)"
SCHEDULED_BLOCK = "This block is listed in dense_blocks: exact kernels only"
ON_CPU = "The model runs on {}: attention kernels need a CUDA or ROCm GPU"


@dataclass(frozen=True)
class BlockNumbers:
    """Numbers blocks over all stacks in execution order. starts: block type -> first number."""

    starts: Mapping[str, int]

    def number(self, key: BlockKey) -> int:
        """The number `dense_blocks` means; without block ids, the call's place in the model."""
        if key.block_type == "call":
            return key.ordinal
        return self.starts.get(key.block_type, 0) + key.block_index


class Schedule:
    """Where only exact kernels run."""

    def __init__(self, config: AttentionConfig, numbers: BlockNumbers):
        self._first, self._last = config.dense_first_steps, config.dense_last_steps
        self._blocks, self._numbers = parse_blocks(config.dense_blocks), numbers

    def dense_step(self, step: int, num_steps: int) -> bool:
        return step < self._first or step >= num_steps - self._last

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
    if config.policy == "manual":
        kernel = kernels[config.backend]
        if kernel.category == APPROXIMATE:
            return (kernel,), ()
        return (), (kernel,)
    names = [n for n in policies[config.policy] if n in kernels]
    approximate = tuple(kernels[n] for n in names if kernels[n].category == APPROXIMATE)
    exact = tuple(kernels[n] for n in policies["exact"] if n in kernels)
    assert all(k.category == EXACT for k in exact)
    return approximate, exact


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
