"""One model call within a run, and the arguments of ComfyUI's hooks that tell which it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RUN = "slipstream.run"  # transformer_options key while sampling; also our wrappers' key
CALL = "slipstream.call"  # transformer_options key during one model call


@dataclass(frozen=True)
class BranchKey:
    """Which conditionings a model call serves, apart from the other calls of its evaluation.

    uuids: of the conds in the batch; occurrence: how often they came before in this evaluation
    (skip-layer guidance calls again with the same); window: frame indices of a context window.
    """

    uuids: tuple[Any, ...]
    occurrence: int
    window: tuple[int, ...] | None


@dataclass
class ModelCall:
    """One call of the model within an evaluation. `index` counts calls over the whole run."""

    index: int
    step: int
    evaluation: int
    key: BranchKey
    cond_or_uncond: tuple[int, ...]  # 0 = cond, 1 = uncond, per chunk of the batch
    num_blocks: int | None = None  # set by whoever decides which blocks run
    skipped_blocks: frozenset[int] = frozenset()  # indices over all stacks, in execution order
    open_from: int | None = None  # blocks from here on wait for a decision
    num_ranks: int = 1  # processes that share it: each has the hidden states of its own tokens

    def next_blocks(self, after: int) -> Iterator[int]:
        """Indices of the blocks behind `after` that will run in this call, as far as decided."""
        end = self.num_blocks or 0
        if self.open_from is not None:
            end = min(end, self.open_from)
        for index in range(after + 1, end):
            if index not in self.skipped_blocks:
                yield index


def call_options(args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """transformer_options of an APPLY_MODEL or DIFFUSION_MODEL call, by keyword or position."""
    options = kwargs.get("transformer_options")
    if isinstance(options, dict):
        return options
    return next((a for a in args if isinstance(a, dict) and RUN in a), None)


def with_options(
    args: Any, kwargs: dict[str, Any], options: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the same call with other transformer_options."""
    old = call_options(args, kwargs)
    if kwargs.get("transformer_options") is old:
        return list(args), {**kwargs, "transformer_options": options}
    return [options if a is old else a for a in args], kwargs
