"""Which step measures, which one changes residency or prefetch, and which one judges the change.

Step 0 warms up. Step 1 is measured block by block, before anything changes. At the start of step
2 the plan is made and what the mode does with it is tried (trial.py). The first step under a new
setting makes its buffers and is not judged; the next one is held against the measured one, and the
change is undone unless it was worth it. A run that begins with what an earlier one found measures
only, unless there is room again.

Mode auto tries prefetch where at least 3 % are expected and keeps it where as much was measured.
Under classic memory it also tries to give way, fewer weights, on a device too full for activations
and ComfyUI's reserve. That has to gain as much: the measured step ran, so its activations fit after
all. A driver that had spilled to RAM shows in a far shorter step; where it does not, nothing had
spilled and ComfyUI's own choice was right.
"""

from collections.abc import Sequence
from typing import Any

from ..memory import counters
from . import host, measure
from .blocks import Unit
from .config import OffloadConfig
from .measure import Measured, Proposal, StepTimes
from .plan import MIN_GAIN, SLOWER
from .timing import BlockTimes, DeviceClock
from .trial import Decision, Setting, Trial, Verdict

MEASURED_STEP, PLANNED_STEP, JUDGED_STEP = 1, 2, 3
LAST_MEASURED_STEP = 4  # where caches leave out blocks: how long mode auto waits for a whole step
STEPS_TO_TRY = 3  # the first one, the one that is judged, and one to gain from


class Tuner:
    """The steps of one run. `setting` is in force; `begin_step` says when it changes.

    num_steps: of the run; trial: open until what was `tried` is judged; verdict: how that ended,
    or why nothing was tried; gain: the measured one, as a share of a model call.
    """

    def __init__(
        self,
        patcher: Any,
        config: OffloadConfig,
        units: Sequence[Unit],
        *,
        can_prefetch: bool,
        num_steps: int,
    ):
        self._patcher = patcher
        self._config = config
        self._units = units
        first = {id(unit.module): at for at, unit in reversed(list(enumerate(units)))}
        self._positions = sorted(first.values())  # one module may have two places in a stack
        self._can_prefetch = can_prefetch
        self._num_steps = num_steps
        self._device = patcher.load_device
        self.steps = StepTimes(DeviceClock(self._device))
        self.times: BlockTimes | None = None  # of the step that is being measured
        self.latest: Measured | None = None
        self.proposal: Proposal | None = None
        self.predicted_step_seconds: float | None = None
        self.trial: Trial | None = None
        self.tried: Setting | None = None
        self.verdict: Verdict | None = None
        self.gain: float | None = None
        self.settled_step = JUDGED_STEP  # from here on steps run alike, as far as known
        self._baseline: Measured | None = None
        self._decision: Decision | None = None
        self._allocated = 0
        self.is_fixed = config.mode == "manual"
        prefetches = can_prefetch and config.mode in ("memory", "manual")
        self.setting = Setting(prefetches=prefetches)
        if config.mode == "memory" and can_prefetch:
            self.setting = Setting(resident_bytes=0, prefetches=True)

    @property
    def is_rolled_back(self) -> bool:
        """Something was tried and undone, in this run or in the one it follows."""
        return self.verdict in ("undone", "undone before")

    @property
    def stages(self) -> bool:
        """Whether room for staged blocks is to be kept: in mode speed before they come, too."""
        will_stage = self._config.mode == "speed" and self._can_prefetch
        return self.setting.prefetches or (will_stage and not self.is_rolled_back)

    def follow(self, decision: Decision | None) -> None:
        """Begin with what an earlier run of the same shape, config and card found."""
        if decision is None or self._config.mode == "manual":
            return
        if decision.setting.prefetches and not self._can_prefetch:
            return
        self.is_fixed = True
        self._decision = decision
        self.setting = decision.setting
        self.tried, self.gain = decision.tried, decision.gain
        self.verdict = "undone before" if decision.is_rolled_back else "kept before"
        self.predicted_step_seconds = decision.predicted_step_seconds

    def begin_step(self, buffer_bytes: int) -> Setting | None:
        """A new step begins. Returns the setting to put in force from here on, if it changes.

        buffer_bytes: device memory of the block buffers now.
        """
        step = len(self.steps.marks)
        self.steps.mark()
        self._end_measuring(step - 1)
        changed = None
        if self.trial is not None:
            changed = self._judge(step)
        elif self.proposal is None and self._baseline is not None and step >= PLANNED_STEP:
            changed = self._plan(step, buffer_bytes)
        if self._units and self._wants_times(step):
            self._start_measuring()
        return changed

    @property
    def num_steps(self) -> int:
        """Steps that have ended."""
        return max(len(self.steps.marks) - 1, 0)

    def finish(self) -> None:
        """Sampling is over: the last step ends here, and nothing can be changed any more."""
        if not self.steps.marks:
            return
        self.steps.mark()
        counters.synchronize(self._device)
        self._end_measuring(self.num_steps - 1)
        if self.trial is not None:
            self._judge(self.num_steps)

    def decision(self) -> Decision | None:
        """What later runs should begin with; None: with the widgets, and find out themselves.

        Mode auto remembers nothing that was not judged, the others what they were told to do.
        """
        return self._decision

    def _wants_times(self, step: int) -> bool:
        if self._baseline is None and MEASURED_STEP <= step <= LAST_MEASURED_STEP:
            return True
        if self.trial is not None:
            return True
        return step == JUDGED_STEP and self.setting.prefetches

    def _start_measuring(self) -> None:
        counters.synchronize(self._device)  # all measured steps begin alike
        self.times = BlockTimes(self.steps.clock)
        counters.reset_peak(self._device)
        self._allocated = counters.allocated_bytes(self._device)[0]

    def _end_measuring(self, step: int) -> None:
        times, self.times = self.times, None
        if times is None:
            return
        if not times.num_calls:
            self.latest = self._baseline
            return
        counters.synchronize(self._device)
        self.latest = Measured(
            step_seconds=self.steps.seconds(step),
            num_calls=times.num_calls,
            call_seconds=times.call_seconds(),
            work=times.work(self._positions),
            units=times.read(),
            activation_bytes=measure.activation_bytes(self._device, self._allocated),
            is_staged=self.setting.prefetches,
        )
        waits_for_whole = self._config.mode == "auto" and not self.is_fixed
        if self._baseline is None and (self.latest.work.is_whole or not waits_for_whole):
            self._baseline = self.latest

    def _plan(self, step: int, buffer_bytes: int) -> Setting | None:
        assert self._baseline is not None
        if not self._baseline.units or host.has_weight_hooks(self._patcher):
            return None
        self.proposal = proposal = measure.propose(
            self._patcher, self._units, self._baseline, self._config, buffer_bytes
        )
        if self.is_fixed:
            return self._keep_or_fill(step, proposal)
        if self._config.mode == "auto":
            return self._plan_auto(step, proposal)
        before, plan = self.setting, proposal.plan
        wants_prefetch = (
            self._config.mode == "speed" and plan.depth >= 0 and self._can_prefetch
        )  # memory does from its first step
        moves = self._config.mode == "memory" or proposal.is_short
        moves |= wants_prefetch and proposal.needs_room
        after = Setting(
            resident_bytes=plan.resident_bytes if moves else before.resident_bytes,
            first_blocks=plan.resident_blocks if moves else before.first_blocks,
            prefetches=before.prefetches or wants_prefetch,
        )
        if after.prefetches:
            self.predicted_step_seconds = (
                proposal.step_seconds if moves else proposal.unchanged_seconds
            )
        return self._try(step, after, least_gain=-SLOWER)

    def _plan_auto(self, step: int, proposal: Proposal) -> Setting | None:
        """Prefetch where it should gain; else fewer weights where activations need the room."""
        can_gain = self._can_prefetch and proposal.can_stage
        gains = can_gain and proposal.prefetch_gain >= MIN_GAIN
        if not gains and not proposal.is_short:
            return None
        if self._num_steps - step < STEPS_TO_TRY:
            self.verdict = "too few steps"
            return None
        if not gains:
            less = Setting(resident_bytes=proposal.fits_bytes)
            return self._try(step, less, least_gain=MIN_GAIN)
        self.predicted_step_seconds = proposal.unchanged_seconds
        after = Setting(prefetches=True)
        if proposal.needs_room:
            self.predicted_step_seconds = proposal.step_seconds
            plan = proposal.plan
            after = Setting(
                resident_bytes=plan.resident_bytes,
                first_blocks=plan.resident_blocks,
                prefetches=True,
            )
        return self._try(step, after, least_gain=MIN_GAIN)

    def _keep_or_fill(self, step: int, proposal: Proposal) -> Setting | None:
        """A run that follows an earlier one changes only if everything fits by now."""
        if self.setting.prefetches:
            self.predicted_step_seconds = proposal.unchanged_seconds
        is_own = self._config.mode in ("auto", "speed") and self.setting != Setting()
        if not is_own or proposal.plan.resident_bytes is not None:
            return None
        self._decision = self.tried = self.verdict = self.gain = None
        return self._change_to(step, Setting())

    def _try(self, step: int, setting: Setting, *, least_gain: float) -> Setting | None:
        before = self.setting
        if setting == before:
            return None
        assert self._baseline is not None
        self.trial = Trial(
            step=step, previous=before, least_gain=least_gain, baseline=self._baseline
        )
        self.tried = self._change_to(step, setting)
        # More resident weights alone cannot make a step slower: nothing to judge.
        if before.prefetches == setting.prefetches and before.resident_bytes == 0:
            self.trial = None
        if self._config.mode != "auto":
            self._remember()
        return setting

    def _judge(self, step: int) -> Setting | None:
        """Hold the step that has ended against the baseline, if it can be."""
        assert self.trial is not None
        trial = self.trial
        gain = trial.step_ended(self.latest)
        if gain is None and not trial.is_over(step):
            return None
        self.trial, self.gain = None, gain
        is_undone = self._config.mode == "auto" if gain is None else gain < trial.least_gain
        self.verdict = "undone" if is_undone else "kept"
        if gain is None:
            self.verdict = "not comparable"
        if is_undone:
            self.predicted_step_seconds = None
            self._change_to(step, trial.previous)
        if gain is not None:
            self._remember()
        return trial.previous if is_undone else None

    def _remember(self) -> None:
        self._decision = Decision(
            setting=self.setting,
            predicted_step_seconds=self.predicted_step_seconds,
            tried=self.tried,
            is_rolled_back=self.is_rolled_back,
            gain=self.gain,
        )

    def _change_to(self, step: int, setting: Setting) -> Setting:
        self.setting = setting
        self.settled_step = step + 1
        return setting
