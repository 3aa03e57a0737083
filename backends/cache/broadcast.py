"""PAB, pyramid attention broadcast (arXiv 2408.12588): attention outputs are kept for some steps.

Cross attention changes least and is kept longest. Installed as an attention override for one model
call, on top of whatever override is there, which still gets every call that is computed. A budget
decides which layers may keep their output: cross attention first, then the middle of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.request import BlockKey
from ..calls import CALL, BranchKey, ModelCall, with_options
from ..compiler import unrecorded
from ..run import Run
from .config import CacheConfig
from .decisions import Decision, Decisions, Event, branch_name
from .schedule import ASK, Schedule

OVERRIDE = "optimized_attention_override"
_LATEST = 0.85  # PAB leaves the last part of the run alone
Layer = tuple[BranchKey, BlockKey]


@dataclass
class _Kept:
    output: torch.Tensor
    computed_at: int  # evaluation index
    query: tuple[Any, ...]  # shape, dtype and device it answered


def plan_layers(
    sizes: dict[Layer, tuple[str, int]], ranges: dict[str, int], budget_bytes: int
) -> set[Layer]:
    """Layers that may keep their output: cross before self, then from the middle outwards.

    sizes: layer -> (cross or self, bytes), in execution order; ranges: kind -> reuse range.
    """
    order = list(sizes)
    middle = (len(order) - 1) / 2
    wanted = [layer for layer in order if ranges[sizes[layer][0]] > 1]
    wanted.sort(key=lambda layer: (sizes[layer][0] != "cross", abs(order.index(layer) - middle)))
    chosen, used = set(), 0
    for layer in wanted:
        if used + sizes[layer][1] <= budget_bytes:
            chosen.add(layer)
            used += sizes[layer][1]
    return chosen


class Broadcast:
    """The mechanism: within a model call, attention outputs are computed or repeated."""

    hook = "diffusion_model"
    unit = "attention calls"
    decisions: Decisions | None = None

    def __init__(self, run: Run, config: CacheConfig, schedule: Schedule, *, hook: str):
        self.hook = hook
        self.events: list[Event] = []
        self.layers: dict[tuple[str, int], bool] = {}
        self.peak_bytes = 0
        self._run, self._schedule = run, schedule
        self._ranges = {"cross": config.cross_range, "self": config.self_range}
        self._budget = config.memory_budget_bytes
        self._sizes: dict[Layer, tuple[str, int]] = {}
        self._chosen: set[Layer] | None = None
        self._kept: dict[Layer, _Kept] = {}
        self.num_refused = 0  # layers the budget had no room for

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """One model call with the override in its options."""
        call: ModelCall = options[CALL]
        if self._chosen is None and call.evaluation > 0 and self._sizes:
            self._choose()
        one = _OneCall(self, call, options.get(OVERRIDE))
        args, kwargs = with_options(args, kwargs, {**options, OVERRIDE: one})
        output = executor(*args, **kwargs)
        decision = Decision(one.num_reused > 0, None, "range" if one.num_reused else one.reason)
        self.events.append(
            Event(call.step, call.evaluation, branch_name(call), decision, one.num_computed,
                  one.num_reused)
        )  # fmt: skip
        return output

    def close(self) -> None:
        self._kept.clear()

    def is_open(self, step: int) -> bool:
        late = step >= _LATEST * self._schedule.num_steps
        return self._schedule.verdict(step) == ASK and not late

    def find(
        self, layer: Layer, kind: str, call: ModelCall, query: tuple[Any, ...]
    ) -> torch.Tensor | None:
        """The kept output, if it may be repeated for a query of this shape, dtype and device."""
        kept = self._kept.get(layer)
        if kept is None or not self.is_open(call.step):
            return None
        if call.evaluation - kept.computed_at >= self._ranges[kind]:
            return None
        return kept.output.clone() if kept.query == query else None

    def keep(
        self, layer: Layer, kind: str, call: ModelCall, query: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        """Remember a computed output while the budget and the schedule have a use for it."""
        if self._chosen is None:
            self._sizes[layer] = kind, output.numel() * output.element_size()
            return
        near = self.is_open(call.step + 1) or self.is_open(call.step)
        if layer not in self._chosen or not near:
            self._kept.pop(layer, None)
            return
        with unrecorded():
            self._kept[layer] = _Kept(output.clone(), call.evaluation, query)
        held = sum(k.output.numel() * k.output.element_size() for k in self._kept.values())
        self.peak_bytes = max(self.peak_bytes, held)

    def _choose(self) -> None:
        if not any(kind == "cross" for kind, _ in self._sizes.values()):
            self._ranges["self"] = max(self._ranges["self"], 2)  # joint attention is all there is
        self._chosen = plan_layers(self._sizes, self._ranges, self._budget)
        wanted = sum(self._ranges[kind] > 1 for kind, _ in self._sizes.values())
        self.num_refused = wanted - len(self._chosen)
        if self.num_refused:
            self._run.note(
                f"pab keeps {len(self._chosen)} of {wanted} attention outputs: its budget is "
                f"{self._budget / 2**30:.1f} GiB"
            )


class _OneCall:
    """The override of one model call. Counts the attention calls of each block."""

    def __init__(self, owner: Broadcast, call: ModelCall, previous: Callable[..., Any] | None):
        self._owner, self._call, self._previous = owner, call, previous
        self._ordinals: dict[tuple[str, int], int] = {}
        self.num_computed = self.num_reused = 0
        self.reason = "closed" if not owner.is_open(call.step) else "range"

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block = self._block(kwargs.get("transformer_options") or {})
        layer = (self._call.key, block)
        q, k = args[0], args[1]
        is_tensor = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor)
        kind = "cross" if is_tensor and q.shape[-2] != k.shape[-2] else "self"
        query = (q.shape, q.dtype, q.device) if is_tensor else ()
        if is_tensor:
            kept = self._owner.find(layer, kind, self._call, query)
            if kept is not None:
                self._count(block, reused=True)
                return kept
        if self._previous is not None:
            output = self._previous(func, *args, **kwargs)
        else:
            output = func(*args, **kwargs)
        if is_tensor and isinstance(output, torch.Tensor):
            self._owner.keep(layer, kind, self._call, query, output)
        self._count(block, reused=False)
        return output

    def _count(self, block: BlockKey, *, reused: bool) -> None:
        self.num_reused += reused
        self.num_computed += not reused
        self._owner.layers[str(block), self._call.evaluation] = reused

    def _block(self, options: dict[str, Any]) -> BlockKey:
        """ComfyUI's block id and the call's number in the block; else its number in all."""
        index = options.get("block_index")
        where = ("call", 0) if index is None else (str(options.get("block_type", "block")), index)
        ordinal = self._ordinals.get(where, 0)
        self._ordinals[where] = ordinal + 1
        return BlockKey(where[0], where[1], ordinal)
