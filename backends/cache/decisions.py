"""When to compute and when to reuse, in one run: schedule, then branches, then engine.

Order of a decision: nothing comparable stored -> compute; the schedule says compute; in cfg_mode
shared the first branch of this evaluation has decided -> follow it; a static mask -> reuse; else
the engine compares. A `decider` may overrule every decision (sequence parallel: rank 0 decides).
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..calls import BranchKey, ModelCall
from ..compiler import unrecorded
from ..run import Run
from .engine import Engine, Streams
from .schedule import COMPUTE, REUSE, Schedule

# A key that was absent for more evaluations is forgotten: moving context windows and areas would
# otherwise pile up residuals that never fit again.
_FORGET_AFTER = 2
# With a static mask nothing measures how far the model has moved on: extrapolating further than
# this has cost more accuracy than repeating (relative error .116 against .032).
_MAX_STATIC_GAP = 3

OVERRULED = "sequence parallel decided"

Decider = Callable[[ModelCall, bool], bool]  # what this process would do -> what is done
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Decision:
    """What one model call does, and why. diff: the change compared, None if none was."""

    reuse: bool
    diff: float | None
    reason: str


@dataclass(frozen=True)
class Event:
    """One decided model call, for the report."""

    step: int
    evaluation: int
    branch: str
    decision: Decision
    blocks_computed: int = 0
    blocks_skipped: int = 0


@dataclass(frozen=True)
class _Held:
    """What a stored residual belongs to. computed_at: evaluation index."""

    signature: Signature
    computed_at: int


class Decisions:
    """One run's decisions. Thread-safe: core's MultiGPU CFG split calls the model from threads."""

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        engine: Engine,
        *,
        shared: bool,
        reset_at_step: int = -1,
        decider: Decider | None = None,
    ):
        self.schedule, self.engine = schedule, engine
        self.decider = decider
        self._run, self._shared, self._reset_at_step = run, shared, reset_at_step
        self._lock = threading.RLock()
        self._held: dict[Hashable, _Held] = {}
        self._seen: dict[Hashable, int] = {}  # key -> evaluation index
        self._evaluation = self._step = -1
        self._sigma = float("inf")
        self._leader: bool | None = None
        self._leader_key: BranchKey | None = None
        self.is_monotone = True  # sigma has fallen at every evaluation
        self._most_bytes = 0

    def begin(self, call: ModelCall, signature: Signature) -> Decision | None:
        """The decision for a call that starts, or None if only its metric can tell.

        signature: shapes, dtypes and devices; a residual of another one is not reused.
        """
        with self._lock:
            self._enter(call)
            held = self._held.get(call.key)
            if held is not None and held.signature != signature:
                self._drop(call.key)
                held = None
            self._seen[call.key] = call.evaluation
            self.engine.begin(call.key, call.evaluation)
            verdict = self.schedule.verdict(call.step)
            if held is None:
                return self._settle(call, Decision(False, None, "first"))
            if verdict == COMPUTE:
                return self._settle(call, Decision(False, None, self.schedule.reason(call.step)))
            if self._shared and self._leader is not None:
                return self._settle(call, Decision(self._leader, None, "follows"))
            if verdict == REUSE:
                return self._settle(call, Decision(True, None, "mask"))
            return None

    def ask(self, call: ModelCall, metric: torch.Tensor | None) -> Decision:
        """The decision for a call that `begin` left open. metric None: it could not be had."""
        with self._lock, unrecorded():
            answer = self.engine.ask(call.key, metric)
            return self._settle(call, Decision(answer.reuse, answer.diff, answer.reason))

    def observe(self, call: ModelCall, reuse: bool, metric: torch.Tensor) -> None:
        """Hand the engine the metric of a decided call."""
        with self._lock, unrecorded():
            self.engine.observe(call.key, reuse, metric)

    def wants_metric(self, call: ModelCall) -> bool:
        """Whether a later call will be compared with this one's metric."""
        if not self.engine.needs_metric or self.schedule.num_asked == 0:
            return False
        return not self._shared or call.key == self._leader_key

    def store(self, call: ModelCall, residual: Streams, signature: Signature) -> None:
        """Keep the residual of a computed call."""
        with self._lock, unrecorded():
            self.engine.store(call.key, residual)
            self._held[call.key] = _Held(signature, call.evaluation)

    def predict(self, call: ModelCall) -> Streams:
        """The residual for a reused call."""
        with self._lock, unrecorded():
            gap = call.evaluation - self._held[call.key].computed_at
            static = self.schedule.mask is not None and self.schedule.static
            extrapolate = self.is_monotone and not (static and gap > _MAX_STATIC_GAP)
            return self.engine.predict(call.key, extrapolate)

    @property
    def peak_bytes(self) -> int:
        """The most that the engine has held."""
        with self._lock:
            self._look()
            return self._most_bytes

    def _look(self) -> None:
        """What the engine holds only shrinks by a drop or close, so these look first."""
        self._most_bytes = max(self._most_bytes, self.engine.nbytes())

    def close(self) -> None:
        """Drop every tensor."""
        with self._lock:
            self._look()
            self.engine.close()
            self._held.clear()
            self._seen.clear()

    def _settle(self, call: ModelCall, decision: Decision) -> Decision:
        if self.decider is not None:
            wanted = self.decider(call, decision.reuse)
            if wanted != decision.reuse and (not wanted or call.key in self._held):
                decision = Decision(wanted, decision.diff, OVERRULED)
        if self._leader is None:
            self._leader = decision.reuse
        self.engine.settle(call.key, decision.reuse)
        return decision

    def _enter(self, call: ModelCall) -> None:
        """Once per evaluation: no leader yet, forget stale keys, watch the sigmas."""
        if call.evaluation == self._evaluation:
            return
        if call.step == self._reset_at_step != self._step:
            for key in list(self._seen):
                self._drop(key)
        sigma = self._run.sigma
        if sigma > self._sigma * (1 - 1e-6):
            self.is_monotone = False
        self._sigma, self._evaluation, self._step = sigma, call.evaluation, call.step
        self._leader, self._leader_key = None, call.key
        oldest = call.evaluation - _FORGET_AFTER - 1
        for key in [key for key, seen in self._seen.items() if seen < oldest]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        if key in self._held:
            self._look()
        self.engine.drop(key)
        self._held.pop(key, None)
        self._seen.pop(key, None)


def branch_name(call: ModelCall) -> str:
    """A call's branch in words: "cond", "uncond+cond", "cond, call 2", "cond, frames 4-19"."""
    names = "+".join("uncond" if i == 1 else "cond" for i in call.cond_or_uncond) or "model"
    if call.key.occurrence:
        names += f", call {call.key.occurrence + 1}"
    if call.key.window:
        names += f", frames {min(call.key.window)}-{max(call.key.window)}"
    return names
