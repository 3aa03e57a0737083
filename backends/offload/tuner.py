"""Which step measures, which one changes residency or prefetch, and which one judges the change.

Step 0 warms up. Step 1 is measured block by block, before anything changes. At the start of step
2 the plan is made and put in force; step 3 is held against step 1, and a change that made it more
than 3 % slower is rolled back, but not one that gave way on a device too full for activations. A
run that begins with the setting of an earlier one measures only, unless there is room again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..memory import counters
from . import host, measure
from .blocks import Unit
from .config import OffloadConfig
from .measure import Measured, Proposal, StepTimes
from .plan import SLOWER
from .timing import BlockTimes, DeviceClock

MEASURED_STEP, PLANNED_STEP, JUDGED_STEP = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step runs. resident_bytes: None leaves it to the widget; first_blocks: loaded first."""

    resident_bytes: int | None = None
    first_blocks: tuple[int, ...] = ()
    prefetches: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a run found: the setting to begin with, the step it predicts, whether it was undone."""

    setting: Setting
    predicted_step_seconds: float | None
    is_rolled_back: bool = False


@dataclass
class Memo:
    """(latent shape, config) -> Decision. Numbers only; on the MODEL, shared by its clones."""

    decisions: dict[tuple[tuple[int, ...], OffloadConfig], Decision] = field(default_factory=dict)


class Tuner:
    """The steps of one run. `setting` is in force; `begin_step` says when it changes."""

    def __init__(
        self, patcher: Any, config: OffloadConfig, units: Sequence[Unit], *, can_prefetch: bool
    ):
        self._patcher = patcher
        self._config = config
        self._units = units
        self._can_prefetch = can_prefetch
        self._device = patcher.load_device
        self.steps = StepTimes(DeviceClock(self._device))
        self.times: BlockTimes | None = None  # of the step that is being measured
        self.latest: Measured | None = None
        self.proposal: Proposal | None = None
        self.predicted_step_seconds: float | None = None
        self.is_rolled_back = False
        self._measured: Measured | None = None
        self._previous: Setting | None = None  # what to go back to
        self._allocated = 0
        self.is_fixed = config.mode == "manual"
        prefetches = can_prefetch and config.mode in ("memory", "manual")
        self.setting = Setting(prefetches=prefetches)
        if config.mode == "memory" and can_prefetch:
            self.setting = Setting(resident_bytes=0, prefetches=True)

    def follow(self, decision: Decision | None) -> None:
        """Begin with what an earlier run of the same shape and config found."""
        if decision is None or self.is_fixed:
            return
        if decision.setting.prefetches and not self._can_prefetch:
            return
        self.is_fixed = True
        self.setting = decision.setting
        self.predicted_step_seconds = decision.predicted_step_seconds
        self.is_rolled_back = decision.is_rolled_back

    def begin_step(self, buffer_bytes: int) -> Setting | None:
        """A new step begins. Returns the setting to put in force from here on, if it changes.

        buffer_bytes: device memory of the block buffers now.
        """
        step = len(self.steps.marks)
        self.steps.mark()
        if self.times is not None:
            counters.synchronize(self._device)
            self._read(step - 1)
        changed = None
        if step == PLANNED_STEP and self._measured is not None:
            changed = self._plan(buffer_bytes)
        elif step == JUDGED_STEP + 1 and self._previous is not None:
            changed = self._judge()
        if step in (MEASURED_STEP, JUDGED_STEP) and self._units:
            self._start_measuring()
        return changed

    @property
    def num_steps(self) -> int:
        """Steps that have ended."""
        return max(len(self.steps.marks) - 1, 0)

    def finish(self) -> None:
        """Sampling is over: the last step ends here."""
        if self.steps.marks:
            self.steps.mark()
            counters.synchronize(self._device)
        if self.times is not None and self.times.num_calls:
            self._read(len(self.steps.marks) - 2)

    def decision(self) -> Decision | None:
        """What later runs should begin with; None before the plan was made."""
        if self.proposal is None:
            return None
        return Decision(
            setting=self.setting,
            predicted_step_seconds=self.predicted_step_seconds,
            is_rolled_back=self.is_rolled_back,
        )

    def _start_measuring(self) -> None:
        self.times = BlockTimes(self.steps.clock)
        counters.reset_peak(self._device)
        self._allocated = counters.allocated_bytes(self._device)[0]

    def _read(self, step: int) -> None:
        assert self.times is not None
        self.latest = Measured(
            step_seconds=self.steps.seconds(step),
            num_calls=self.times.num_calls,
            units=self.times.read(),
            activation_bytes=measure.activation_bytes(self._device, self._allocated),
            is_staged=self.setting.prefetches,
        )
        self.times = None
        if step == MEASURED_STEP:
            self._measured = self.latest

    def _plan(self, buffer_bytes: int) -> Setting | None:
        assert self._measured is not None
        if not self._measured.units or host.has_weight_hooks(self._patcher):
            return None
        self.proposal = proposal = measure.propose(
            self._patcher, self._units, self._measured, self._config, buffer_bytes
        )
        if self.is_fixed:
            return self._keep_or_fill(proposal)
        mode, plan, before = self._config.mode, proposal.plan, self.setting
        moves = mode == "memory" or proposal.is_short
        wants_prefetch = mode == "speed" and plan.depth >= 0 and self._can_prefetch
        after = Setting(
            resident_bytes=plan.resident_bytes if moves else before.resident_bytes,
            first_blocks=plan.resident_blocks if moves else before.first_blocks,
            prefetches=before.prefetches or wants_prefetch,
        )
        if after.prefetches:
            self.predicted_step_seconds = (
                proposal.step_seconds if moves else proposal.unchanged_seconds
            )
        return self._change_to(after, may_undo=not proposal.is_short)

    def _keep_or_fill(self, proposal: Proposal) -> Setting | None:
        """A run that follows an earlier one changes only if the device is no longer too full."""
        if self.setting.prefetches:
            self.predicted_step_seconds = proposal.unchanged_seconds
        gave_way = (
            self._config.mode in ("auto", "speed") and self.setting.resident_bytes is not None
        )
        if not gave_way or proposal.plan.resident_bytes is not None:
            return None
        self.predicted_step_seconds = None
        return self._change_to(Setting(), may_undo=False)

    def _judge(self) -> Setting | None:
        counters.synchronize(self._device)
        assert self._previous is not None
        assert self._measured is not None
        if self.steps.seconds(JUDGED_STEP) <= self._measured.step_seconds * (1 + SLOWER):
            return None
        self.is_rolled_back = True
        self.predicted_step_seconds = None
        return self._change_to(self._previous, may_undo=False)

    def _change_to(self, setting: Setting, *, may_undo: bool) -> Setting | None:
        before = self.setting
        if setting == before:
            return None
        # More resident weights alone cannot make a step slower: nothing to judge.
        only_raises = before.prefetches == setting.prefetches and before.resident_bytes == 0
        self._previous = before if may_undo and not only_raises else None
        self.setting = setting
        return setting
