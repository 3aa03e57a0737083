"""The block cache of one run: decisions, engine and stack override put together, call by call."""

from collections.abc import Hashable
from operator import is_
from typing import Any

import torch

from ..architectures import Architecture, stack_blocks, whole_sequence
from ..calls import CALL, ModelCall, with_options
from ..run import Run
from .borders import BorderCheck
from .decisions import Decision, Decisions, Event, branch_name
from .mechanism import Deciding
from .stack import (
    FRESH,
    NOTHING,
    STORED,
    Probe,
    StackBlock,
    StackOverride,
    Streams,
    logical_stack,
)


class BlockCache(Deciding):
    """The mechanism: middle blocks of a stack are computed or replaced by what they added before.

    front, back: blocks at either end that always run; probe: TeaCache's metric (front is 0 then).
    """

    unit = "blocks"

    def __init__(
        self,
        run: Run,
        architecture: Architecture,
        decisions: Decisions,
        *,
        front: int,
        back: int,
        probe: Probe | None = None,
    ):
        wraps = architecture.notes.diffusion_model_wrappers
        self.hook = "diffusion_model" if wraps else "apply_model"
        super().__init__(decisions)
        self._run, self._architecture = run, architecture
        self._front, self._back, self._probe = front, back, probe
        self._stacks: dict[int, tuple[list[torch.nn.Module], tuple[StackBlock, ...]]] = {}
        self._layouts: dict[Hashable, tuple[int, tuple[bool, ...]]] = {}  # key -> add_at, present
        notes = architecture.notes
        self._between = NOTHING
        if notes.adds_between:
            self._between = STORED if notes.adds_from_stream else FRESH
        self._checked = False

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """One model call, under the overrides."""
        call: ModelCall = options[CALL]
        network = executor.class_obj
        if self.hook == "apply_model":
            network = network.diffusion_model
        blocks = self._stack(network)
        signature = (*signature_of(args), call.num_ranks)
        decision = self.decisions.begin(call, signature)
        call.num_blocks = len(blocks)
        between = self._between
        if between == NOTHING and adds_between(args, kwargs, options):
            between = FRESH
        if self._architecture.notes.whole_sequence:
            options = whole_sequence(self._architecture, options)
            args, kwargs = with_options(args, kwargs, options)
        one = _OneCall(self, call, blocks, decision, between)
        output = one.run(executor, args, kwargs)
        if one.override.num_skipped and not one.override.applied:
            # A patch took the block that should have added the residual: this call is not usable.
            self._run.note(
                f"{self._architecture.name}: other blocks ran than in the call before; "
                "computed again"
            )
            one = _OneCall(self, call, blocks, Decision(False, None, "blocks changed"), between)
            output = one.run(executor, args, kwargs)
        self._finish(one, signature)
        return output

    def close(self) -> None:
        super().close()
        self._stacks.clear()
        self._layouts.clear()

    def _finish(self, one: "_OneCall", signature: tuple[Any, ...]) -> None:
        override, call = one.override, one.call
        if one.decision is None or not override.num_computed + override.num_skipped:
            name = self._architecture.name
            self._run.note(f"{name}: its blocks were not called, so nothing can be reused")
            return
        if override.residual is not None and override.stored_at is not None and one.is_sound:
            present = tuple(stream is not None for stream in override.residual)
            self._layouts[call.key] = override.stored_at, present
            kept = tuple(stream for stream in override.residual if stream is not None)
            self.decisions.store(call, kept, signature)
        self.events.append(
            Event(
                call.step,
                call.evaluation,
                branch_name(call),
                one.decision,
                override.num_computed,
                override.num_skipped,
            )
        )

    def _stack(self, network: torch.nn.Module) -> tuple[StackBlock, ...]:
        """The logical stack; looked up again when a block was exchanged (torch.compile does it)."""
        modules, blocks = self._stacks.get(id(network), ([], ()))
        now = [b for s in self._architecture.stacks for b in stack_blocks(network, s)]
        if len(now) != len(modules) or not all(map(is_, now, modules)):
            blocks = logical_stack(network, self._architecture)
            self._stacks[id(network)] = now, blocks
        return blocks


class _OneCall:
    """The override of one model call, wired to the decisions."""

    def __init__(
        self,
        cache: BlockCache,
        call: ModelCall,
        blocks: tuple[StackBlock, ...],
        decision: Decision | None,
        between: str,
    ):
        self.cache, self.call, self.decision = cache, call, decision
        decisions = cache.decisions
        front, last = cache._front, len(blocks) - cache._back - 1
        self._skippable = frozenset(range(front, last + 1))
        self._check = None if cache._checked else BorderCheck()
        self._between = between
        self.is_sound = True  # the residual is what the blocks added, and nothing else
        if decision is not None:
            self._publish(decision)
        else:
            call.open_from = front  # offload must not copy weights of blocks that may be skipped
        self.override = StackOverride(
            blocks,
            front=front,
            last=last,
            reuse=None if decision is None else decision.reuse,
            decide=self._decide,
            predict=self._predict,
            observe=self._observe if decisions.wants_metric(call) else None,
            probe=cache._probe,
            add_at=cache._layouts.get(call.key, (None,))[0],
            between=between,
            watch=self._check,
        )

    def run(self, executor: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with self.override:
            output = executor(*args, **kwargs)
        if self._check is not None:
            self._close_check(self._check)
        return output

    def _decide(self, metric: torch.Tensor | None) -> bool:
        self.decision = self.cache.decisions.ask(self.call, metric)
        self._publish(self.decision)
        return self.decision.reuse

    def _observe(self, metric: torch.Tensor) -> None:
        assert self.override.reuse is not None
        self.cache.decisions.observe(self.call, self.override.reuse, metric)

    def _predict(self) -> Streams:
        kept = iter(self.cache.decisions.predict(self.call))
        present = self.cache._layouts[self.call.key][1]
        return tuple(next(kept) if there else None for there in present)

    def _publish(self, decision: Decision) -> None:
        self.call.skipped_blocks = self._skippable if decision.reuse else frozenset()
        self.call.open_from = None

    def _close_check(self, check: BorderCheck) -> None:
        """Take note of what the first call showed. Raises ValueError if the join is not known."""
        self.cache._checked = True
        changed, joins_changed = check.close()
        name = self.cache._architecture.name
        if check.reshaped or (joins_changed and not changed and self._between == NOTHING):
            where = check.reshaped or "single"
            raise ValueError(
                f"{name}: the input of its {where} blocks is not what the blocks before returned, "
                "so this cache would be wrong. Use strategy output."
            )
        if changed:
            self.is_sound = self._between != NOTHING
            if self.cache._between == NOTHING:
                self.cache._between = FRESH


def signature_of(args: Any) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of a model call's tensors."""
    tensors = []
    for arg in args:
        parts = arg if isinstance(arg, (list, tuple)) else (arg,)
        tensors += [(t.shape, t.dtype, t.device) for t in parts if isinstance(t, torch.Tensor)]
    return tuple(tensors)


def adds_between(args: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether ControlNet or patches may add to the hidden states between the blocks."""
    if options.get("patches_replace") or options.get("patches"):
        return True
    values = (v for v in (*args, *kwargs.values()) if isinstance(v, dict) and v is not options)
    return any("output" in v or "input" in v for v in values)
