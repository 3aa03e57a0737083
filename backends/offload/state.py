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
from ..memory.section import gib
from ..report import Section
from . import host, measure
from .blocks import units_of
from .budget import KEY, resident_cap, why_no_prefetch
from .config import OffloadConfig
from .driver import BlockDriver, PrefetchError, QueueDriver, Upcoming
from .four_bit import four_bit_bytes
from .section import Outcome, write
from .stream import Streamer
from .trial import Key, Memo, Setting
from .tuner import PLANNED_STEP, Tuner

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
            self._tuner = Tuner(
                run.patcher,
                config,
                self._units,
                can_prefetch=can_prefetch,
                num_steps=run.num_steps,
            )
            self._put_on_patcher(self._tuner.setting, stages=self._tuner.stages)

    def prepare(self, noise_shape: tuple[int, ...]) -> None:
        """Before ComfyUI loads the model: the cap to start with."""
        if self._tuner is None:
            return
        self._shape = noise_shape
        self._tuner.follow(self._memo().decisions.get(self._key()))
        self._put_on_patcher(self._tuner.setting, stages=self._tuner.stages)

    @contextmanager
    def model_call(self, call: "ModelCall", network: Any, batch: tuple[int, ...]) -> Iterator[None]:
        """The scope of one model call: begins a step if it is its first, hooks the blocks.

        batch: shape of the latent that the call is for.
        """
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
        kind = (batch, call.cond_or_uncond)
        with driver.call(self._upcoming(call), self._tuner.times, kind):
            yield

    def section(self) -> Section:
        """The report's offload section; called when sampling is over, however it ended."""
        if self._tuner is not None:
            self._tuner.finish()
            self._remember(self._tuner)
            self._describe(self._tuner)
        return write(self._config, self.outcome)

    def close(self) -> None:
        """Give back buffers, hooks and what was set on the patcher."""
        try:
            self._drop_driver()
        finally:
            if self._tuner is not None:
                self._put_on_patcher(Setting(), stages=None)
            self._patcher = self._tuner = None
            self._units = []

    def _begin_step(self, tuner: Tuner) -> None:
        buffers = self._driver.staged_peak_bytes if self._driver is not None else 0
        was_staged = tuner.setting.prefetches
        changed = tuner.begin_step(buffers)
        if changed is None:
            return
        self._drop_driver()
        before = resident_cap(self._patcher)
        self._put_on_patcher(changed, stages=tuner.stages)
        after = resident_cap(self._patcher)
        gives_back = was_staged and not changed.prefetches and memory.is_dynamic(self._patcher)
        if gives_back:  # the buffers came out of residency, and their pages may come back now
            host.release_cast_buffers(self._device)
        if after != before or gives_back:
            is_undone = tuner.trial is None and tuner.verdict is not None
            if after is None and is_undone:  # what ComfyUI had room for comes back, not more
                after = self._patcher.slipstream_room_bytes
            host.change_residency(self._patcher, after)

    def _remember(self, tuner: Tuner) -> None:
        """For later runs; one that was stopped while it tried something has found nothing out."""
        if tuner.trial is not None and not self._run.is_complete:
            return
        decision, decisions = tuner.decision(), self._memo().decisions
        if decision is None:
            decisions.pop(self._key(), None)
        else:
            decisions[self._key()] = decision

    def _put_on_patcher(self, setting: Setting, *, stages: bool | None) -> None:
        """What `resident_cap` and the load order of this patcher follow from now on."""
        chosen = set(setting.first_blocks)
        tops = [unit.module for unit in self._units if unit.block in chosen]
        self._patcher.slipstream_first = frozenset(id(m) for top in tops for m in top.modules())
        self._patcher.slipstream_planned_bytes = setting.resident_bytes
        self._patcher.slipstream_stages = stages

    def _memo(self) -> Memo:
        memo = self._patcher.get_attachment(KEY)
        assert isinstance(memo, Memo)
        return memo

    def _key(self) -> Key:
        card = f"{self._device} {comfy.device_name(self._device)}"
        return self._shape, self._config, card

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
        self._describe_times(tuner)
        proposal, planned = tuner.proposal, tuner.setting.resident_bytes
        if proposal is not None:
            outcome.plan, outcome.prefetch_gain = proposal.plan, proposal.prefetch_gain
            outcome.copy_rates = proposal.copy_rates
            is_own = planned == proposal.plan.resident_bytes or tuner.is_fixed
            outcome.is_plan_in_force = planned is not None and is_own
        elif self._config.mode in ("speed", "memory") and tuner.num_steps <= PLANNED_STEP:
            outcome.remarks.append(f"no plan: it needs more than {PLANNED_STEP} steps")
        if self._config.mode in ("auto", "speed") and planned is not None:
            outcome.remarks.append("the device was too full: fewer weights stay")
        self._look_for_four_bits(tuner)
        if outcome.streamed_bytes and host.lora_rounds_by_residency(patcher):
            outcome.remarks.append(LORA_ROUNDS)

    def _describe_times(self, tuner: Tuner) -> None:
        outcome, latest = self.outcome, tuner.latest
        if latest is not None and latest.is_staged and tuner.setting.prefetches:
            waiting = sum(unit.waiting for unit in latest.units.values())
            outcome.stall_seconds = waiting * latest.num_calls
        outcome.num_steps = self._run.num_steps
        outcome.tried, outcome.verdict, outcome.gain = tuner.tried, tuner.verdict, tuner.gain
        outcome.is_rolled_back = tuner.is_rolled_back
        outcome.predicted_step_seconds = tuner.predicted_step_seconds
        outcome.measured_step_seconds = tuner.steps.mean(tuner.settled_step)

    def _look_for_four_bits(self, tuner: Tuner) -> None:
        """Whether the whole model would fit in 4 bits, where it does not as it is."""
        outcome, patcher = self.outcome, self._patcher
        if not outcome.streamed_bytes or tuner.latest is None:
            return
        room = measure.room_bytes(patcher, host.cast_buffer_bytes())
        fits = room - tuner.latest.activation_bytes - memory.reserve_bytes()
        fits = min(fits, self._config.budget_bytes or fits)
        total, size = memory.placed_bytes(patcher), four_bit_bytes(self._network)
        if size is None or not size <= fits < total:
            return
        outcome.four_bit_bytes = size
        outcome.remarks.append(
            f"a 4-bit file of this model would fit: about {gib(size)} GiB of weights instead of "
            f"{gib(total)}, where {gib(fits)} fit beside activations (SVDQuant Convert makes one)"
        )
