"""OffloadState: one run under a budget, from the load to the report.

Puts the tuner's settings in force and keeps one driver that hooks the blocks of each model call.
Residency changes only between two model calls and only through ComfyUI's memory manager. Dropped
with the Run; what outlives it are numbers (Memo).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import host as comfy
from ..architectures import find
from ..memory import host as memory
from ..report import Section
from . import host
from .blocks import units_of
from .budget import KEY, resident_cap, why_no_prefetch
from .config import OffloadConfig
from .driver import BlockDriver, PrefetchError, QueueDriver, Upcoming
from .section import Outcome, write
from .stream import Streamer
from .tuner import JUDGED_STEP, PLANNED_STEP, Memo, Setting, Tuner

if TYPE_CHECKING:
    from ..calls import ModelCall
    from ..run import Run

LORA_ROUNDS = (
    "LoRA on 16- or 8-bit weights: ComfyUI rounds resident and streamed ones differently, so the "
    "picture changes slightly with residency"
)


class OffloadState:
    """What offload keeps for one run."""

    def __init__(self, run: "Run", config: OffloadConfig):
        self._run = run
        self._config = config
        self._patcher = run.patcher
        self._device = run.patcher.load_device
        self._network = comfy.diffusion_model(run.patcher)
        self._units = units_of(self._network, find(self._network))
        self._num_blocks = len({unit.block for unit in self._units})
        self._driver: BlockDriver | None = None
        self._tuner: Tuner | None = None
        self._step: int | None = None
        self._shape: tuple[int, ...] = ()
        reason = "mode is off" if config.mode == "off" else host.unsupported(run.patcher)
        self.outcome = Outcome(reason=reason)
        if reason is None:
            self.outcome.no_prefetch = why_no_prefetch(run.patcher, config)
            can_prefetch = self.outcome.no_prefetch is None
            self._tuner = Tuner(run.patcher, config, self._units, can_prefetch=can_prefetch)
            self._put_on_patcher(self._tuner.setting)

    def prepare(self, noise_shape: tuple[int, ...]) -> None:
        """Before ComfyUI loads the model: the cap to start with."""
        if self._tuner is None:
            return
        self._shape = noise_shape
        self._tuner.follow(self._memo().decisions.get((noise_shape, self._config)))
        self._put_on_patcher(self._tuner.setting)

    @contextmanager
    def model_call(self, call: "ModelCall", network: Any) -> Iterator[None]:
        """The scope of one model call: begins a step if it is its first, hooks the blocks."""
        if self._tuner is None or network is not self._network:
            yield
            return
        if call.step != self._step:
            self._step = call.step
            self._begin_step(self._tuner)
        driver = self._driver_for_call(self._tuner)
        if driver is None:
            yield
            return
        with driver.call(self._upcoming(call), self._tuner.times):
            yield

    def section(self) -> Section:
        """The report's offload section; called when sampling is over, however it ended."""
        if self._tuner is not None:
            self._tuner.finish()
            self._describe(self._tuner)
        return write(self._config, self.outcome)

    def close(self) -> None:
        """Give back buffers, hooks and what was set on the patcher."""
        try:
            self._drop_driver()
        finally:
            if self._tuner is not None:
                self._put_on_patcher(Setting())
            self._patcher = self._tuner = None
            self._units = []

    def _begin_step(self, tuner: Tuner) -> None:
        buffers = self._driver.staged_peak_bytes if self._driver is not None else 0
        changed = tuner.begin_step(buffers)
        if changed is None:
            return
        self._drop_driver()
        before = resident_cap(self._patcher)
        self._put_on_patcher(changed)
        after = resident_cap(self._patcher)
        if after != before:
            host.change_residency(self._patcher, after)
        decision = tuner.decision()
        if decision is not None:
            self._memo().decisions[(self._shape, self._config)] = decision

    def _put_on_patcher(self, setting: Setting) -> None:
        """What `resident_cap` and the load order of this patcher follow from now on."""
        chosen = set(setting.first_blocks)
        tops = [unit.module for unit in self._units if unit.block in chosen]
        self._patcher.slipstream_first = frozenset(id(m) for top in tops for m in top.modules())
        self._patcher.slipstream_planned_bytes = setting.resident_bytes

    def _memo(self) -> Memo:
        memo = self._patcher.get_attachment(KEY)
        assert isinstance(memo, Memo)
        return memo

    def _driver_for_call(self, tuner: Tuner) -> BlockDriver | None:
        """The driver of this call: prefetch, or times alone while a step is measured."""
        if tuner.setting.prefetches and self._driver is None and not self.outcome.no_prefetch:
            try:
                self._driver = self._make_prefetch()
            except PrefetchError as error:
                self.outcome.no_prefetch = str(error)
                self._run.note(f"offload without prefetch: {error}")
        if self._driver is None and tuner.times is not None:
            return BlockDriver(self._units)
        return self._driver

    def _make_prefetch(self) -> BlockDriver:
        if memory.is_dynamic(self._patcher):
            return QueueDriver(self._units, self._device)
        depth = self._config.depth(self._num_blocks)
        streamer = Streamer(self._units, self._device, depth=depth)
        if streamer.num_left:
            remark = f"{streamer.num_left} weights of an unknown kind are left to ComfyUI"
            self.outcome.remarks = [remark]
        return streamer

    def _drop_driver(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            self.outcome.num_copies += driver.num_copies
            self.outcome.num_skipped += driver.num_skipped
            self.outcome.buffer_bytes = max(self.outcome.buffer_bytes, driver.staged_peak_bytes)
            driver.close()

    def _upcoming(self, call: "ModelCall") -> Upcoming:
        """Which blocks will run behind one: all, unless a cache decides or is still to decide."""

        def behind(block: int) -> tuple[set[int], bool]:
            if call.num_blocks is None:
                return set(range(block + 1, self._num_blocks)), True
            return set(call.next_blocks(block)), call.open_from is None

        return behind

    def _describe(self, tuner: Tuner) -> None:
        outcome, patcher = self.outcome, self._patcher
        driver = self._driver
        outcome.manager = "dynamic" if memory.is_dynamic(patcher) else "classic"
        outcome.depth = driver.depth if driver is not None else -1
        self._drop_driver()
        outcome.buffer_bytes = max(outcome.buffer_bytes, host.cast_buffer_bytes())
        outcome.resident_bytes = memory.resident_bytes(patcher)
        outcome.streamed_bytes = memory.placed_bytes(patcher) - outcome.resident_bytes
        outcome.pinned_bytes = memory.pinned_bytes(patcher)
        budget = self._config.budget_bytes
        outcome.budget_bytes = resident_cap(patcher) if budget is None else budget
        if tuner.latest is not None and tuner.latest.is_staged:
            waiting = sum(unit.waiting for unit in tuner.latest.units.values())
            outcome.stall_seconds = waiting * tuner.latest.num_calls
        proposal = tuner.proposal
        if proposal is not None:
            outcome.plan, outcome.prefetch_gain = proposal.plan, proposal.prefetch_gain
            outcome.copy_rates = proposal.copy_rates
            outcome.is_plan_in_force = tuner.setting.resident_bytes is not None
            if proposal.is_short and outcome.is_plan_in_force:
                outcome.remarks.append(
                    "the device was too full for activations: fewer weights stay"
                )
        elif self._config.mode in ("speed", "memory") and tuner.num_steps <= PLANNED_STEP:
            outcome.remarks.append(f"no plan: it needs more than {PLANNED_STEP} steps")
        if outcome.streamed_bytes and host.lora_rounds_by_residency(patcher):
            outcome.remarks.append(LORA_ROUNDS)
        outcome.predicted_step_seconds = tuner.predicted_step_seconds
        outcome.measured_step_seconds = tuner.steps.mean(JUDGED_STEP)
        outcome.is_rolled_back = tuner.is_rolled_back
