"""Sequence parallel during one sampling run: which calls of the network are shared, and how.

Every call that cannot be shared runs on rank 0 alone and is counted with its reason. Works on a
Pool and on what apply.py found out about the MODEL; touches no ComfyUI.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..backends.calls import CALL, ModelCall
from ..backends.report import Section
from ..backends.run import Run
from . import batch, block_cache
from .comm import TransportError
from .config import SequenceParallelConfig, choose_layout
from .cost import Meter, advice, advice_on_rows
from .distribute import Distributor, Done
from .launcher import StartFailed
from .mesh import Layout
from .network_call import NetworkCall
from .report import Counts, section
from .route import Baton, Cancelled
from .runs import RunFacts
from .shards import PlanError
from .shared import Alone, BeginAgain, Shared
from .workers import WorkerError

_JUDGED_CALL = 2  # the first shared call of a run warms up


VOID = (
    "An evaluation gave NaN or infinite values and was computed again on one device, as is the "
    "rest of this run: what runs on the workers cannot be looked at"
)


def no_workers(error: Exception) -> str:
    """The sentence for workers that automatic settings could not have."""
    return f"Sequence parallel could not start its workers, so one device does it all: {error}"


class ParallelRun:
    """One run's State. `shared` None: nothing can be shared; `reason` says why not (any more)."""

    def __init__(
        self, run: Run, config: SequenceParallelConfig, shared: Shared | None, reason: str = ""
    ):
        self.run, self.config, self.shared, self.reason = run, config, shared, reason
        self.pair: tuple[Layout, Baton] | None = None  # while two branches run
        self.decisions = block_cache.Decisions()
        self.counts = Counts(workers=len(shared.devices) if shared else 1)
        self._is_attached = False
        if shared is not None:
            self.counts.devices = shared.devices
            self._meter = Meter(shared.pool.clock_of(shared.device))
            self._distributor = Distributor(run, shared, config, self.decisions)

    @property
    def keeps_tensors(self) -> bool:
        """Whether calls are shared: what is cut and exchanged outlives blocks."""
        return self.shared is not None

    # --- layout

    def choose(self, num_rows: int, num_conds: int = 1, *, has_plan: bool = True) -> Layout | None:
        """The layout of calls with so many rows, so many of which may run at once, or None.

        has_plan: False where the tokens of these calls cannot be shared.
        """
        self._attach_cache()
        if self.shared is None or self.reason:
            return None
        return choose_layout(
            self.config,
            world=len(self.shared.devices),
            num_heads=self.shared.num_heads,
            num_rows=1 if self.shared.one_lane else num_rows,
            num_conds=num_conds,
            has_plan=has_plan and self.shared.plan is not None,
        )

    def share_of(self, num_rows: int, *, here: bool = True) -> float:
        """How much of a call of so many rows one rank computes: this one, or the busiest."""
        found = 0.0
        for num_conds in (1, 2):
            layout = self.pair[0] if self.pair else self.choose(num_rows, num_conds)
            if layout is None:
                return 1.0
            counts = self._distributor.deal(layout, num_rows)
            rows = counts[0] if here else max(counts)
            found = max(found, rows / max(num_rows, 1) / layout.ranks)
        return found

    def stop_sharing(self, reason: str) -> None:
        """No further call of this run is shared."""
        self.reason = reason
        self.run.note(reason)

    def forget(self) -> None:
        """The latest evaluation is void, and another rank may be to blame: no more sharing.

        What the workers keep of it is not used again.
        """
        self.decisions.failed()
        if self.shared is not None and not self.reason:
            self.stop_sharing(VOID)

    # --- calls

    def call(
        self,
        executor: Callable[..., Any],
        call: NetworkCall,
        method: str,
        network: torch.nn.Module,
        *,
        is_decided: bool = False,
    ) -> Any:
        """One call of `network`: shared if it can be, else on rank 0 alone.

        is_decided: a block cache has decided about it already, for call.num_ranks. Raises
        BeginAgain if it cannot be carried out so.
        """
        now: ModelCall = call.options[CALL]
        try:
            return self._share(executor, call, method, network)
        except Alone as found:
            reason = found.reason
        if is_decided and now.num_ranks > 1:
            raise BeginAgain(reason)
        now.num_ranks = 1
        return self.alone(reason, now, partial(call.run, executor))

    def prepare(
        self,
        call: ModelCall,
        network: torch.nn.Module,
        options: dict[str, Any],
        num_rows: int,
    ) -> None:
        """Note in `call` how many ranks will share it, before a block cache decides about it."""
        layout = self.pair[0] if self.pair else self.choose(num_rows)
        is_shared = layout is not None and self.refusal(network, options) is None
        call.num_ranks = layout.batch * layout.ranks if layout is not None and is_shared else 1

    def refusal(self, network: torch.nn.Module, options: dict[str, Any]) -> str | None:
        """Why no call of `network` with these transformer_options can be shared, or None."""
        if self.reason or self.shared is None:
            return self.reason or "nothing to share with"
        return self.shared.refusal(network, options)

    def _share(
        self,
        executor: Callable[..., Any],
        call: NetworkCall,
        method: str,
        network: torch.nn.Module,
    ) -> Any:
        """A call over all ranks of the layout. Raises Alone where that cannot be."""
        reason = self.refusal(network, call.options)
        if reason is not None:
            raise Alone(reason)
        layout = self._layout_of(call)
        parts = self._distributor.parts(layout, call)
        try:
            with self._barrier():
                has_workers = self._have_workers(call)
                if has_workers:
                    done = self._distributor.carry_out(
                        layout, parts, method, executor,
                        baton=self.pair[1] if self.pair else None,
                        is_judged=self.counts.shared + 1 == _JUDGED_CALL,
                    )  # fmt: skip
        except (PlanError, StartFailed) as error:
            if self.pair is not None:
                raise  # the pair of branches is repeated on one device
            if isinstance(error, StartFailed) and self.config.is_explicit:
                raise
            reason = str(error) if isinstance(error, PlanError) else no_workers(error)
            self.stop_sharing(reason)
            raise Alone(reason) from None
        if not has_workers:
            raise BeginAgain("")
        if self.pair is None:
            self.decisions.shared()
        self.counts.shared += 1
        self.counts.layouts[layout] = self.counts.layouts.get(layout, 0) + 1
        self._judge(layout, done)
        return done.output

    def _layout_of(self, call: NetworkCall) -> Layout:
        """The layout for one call. Raises Alone where there is nothing to share in it."""
        shared = self.shared
        assert shared is not None
        plan = shared.plan
        refusal = plan.refuse and plan.refuse(call.arguments, call.options) if plan else None
        num_rows = batch.rows(call.arguments) or 1
        if self.pair is not None:
            layout = self.pair[0]
            if layout.ranks > 1 and refusal:
                raise Alone(refusal)
            return layout
        found = self.choose(num_rows, has_plan=not refusal)
        assert found is not None
        if self.config.batch > 1 and found.batch == 1:
            self._say_why_no_rows(found, num_rows)
        if found.world == 1:
            raise Alone(refusal or shared.no_plan or "one conditioning: cfg has nothing to split")
        return found

    def _say_why_no_rows(self, layout: Layout, num_rows: int) -> None:
        """Once a run, to who asked for a batch to be shared."""
        assert self.shared is not None
        sentence = self.shared.one_lane
        if not sentence and num_rows == 1 and layout.ranks > 1:
            sentence = "Batch of 1 and one prompt: tokens are shared instead."
        if sentence and sentence not in self.run.notes:
            self.run.note(sentence)

    def _have_workers(self, call: NetworkCall) -> bool:
        """Whether workers can join this call, which a block cache may have decided about already.

        Starts new ones where some are gone.
        """
        shared = self.shared
        assert shared is not None
        if self.pair is not None and self.pair[1].is_cancelled:
            raise Cancelled  # nothing may be repaired before the fault has been dealt with
        if self._are_ready():
            return True
        is_too_late = self.counts.shared > 0 and self.decisions.lost(call.options[CALL])
        shared.pool.prepare(
            shared.devices, shared.setting, shared.model, meanwhile=shared.meanwhile
        )
        latent = batch.latent(call.arguments)
        self.begin_workers(latent.shape if latent is not None else ())
        if not self._are_ready():
            raise WorkerError("The workers ended while they loaded the model: see ComfyUI's log")
        return not is_too_late

    def _are_ready(self) -> bool:
        shared = self.shared
        assert shared is not None
        return shared.pool.is_ready(
            shared.devices, shared.setting, shared.model, self.run.id, meanwhile=shared.meanwhile
        )

    def begin_workers(self, shape: Sequence[int]) -> None:
        """Have the workers put the model on their devices, for calls on a latent of `shape`."""
        shared = self.shared
        assert shared is not None
        facts = RunFacts(
            id=self.run.id,
            sigmas=self.run.sigmas,
            memory_bytes=self._memory_bytes(shape) + self.groups_bytes,
            techniques=shared.techniques,
        )
        shared.pool.begin_run(shared.devices, shared.model, facts)

    @property
    def groups_bytes(self) -> int:
        """Of every device, for groups that the first shared call will make."""
        assert self.shared is not None
        return self.shared.pool.groups_bytes(self.shared.devices)

    def _memory_bytes(self, shape: Sequence[int]) -> int:
        """What a call on a latent of `shape` needs on the busiest worker."""
        assert self.shared is not None
        if not shape:
            return 0
        return int(self.shared.memory_bytes(shape) * self.share_of(shape[0], here=False))

    def alone(self, reason: str, call: ModelCall, function: Callable[[], Any]) -> Any:
        """A call on rank 0 only, counted with its reason; shown on the node the first time."""
        if self.shared is not None and not self.reason and reason not in self.counts.reasons:
            self.shared.tell(f"On one device: {reason}")
        self.counts.count_local(reason)
        self.decisions.alone(call)
        return function()

    @contextmanager
    def _barrier(self) -> Iterator[None]:
        """Faults are dealt with here, or around both branches if there are two."""
        if self.pair is not None:
            yield
            return
        with self.recovered():
            yield

    @contextmanager
    def recovered(self) -> Iterator[None]:
        """After a fault inside, the workers are usable again, and the first cause is raised."""
        assert self.shared is not None
        try:
            with self.shared.pool.recovered(self.config.timeout_s):
                yield
        except BaseException as error:
            self.decisions.failed()
            if isinstance(error, (WorkerError, TransportError)):
                self.shared.meanwhile()  # a Cancel is what ended it
            raise

    def settle(self) -> None:
        """Sampling has ended: wait for the device. Raises what a shared call came to after all."""
        if self.shared is not None and self.counts.shared:
            with self.recovered():
                self.shared.pool.settle()

    def _attach_cache(self) -> None:
        """Let this run's decisions overrule a block cache that travels; once all have started."""
        if self.shared is not None and not self._is_attached:
            self._is_attached = True
            if "cache" in self.shared.techniques:
                block_cache.attach(self.run.states["cache"], self.decisions)

    # --- cost and report

    def _judge(self, layout: Layout, done: Done) -> None:
        """Say if one device would be faster, and use it from now on if nobody asked for more."""
        assert self.shared is not None
        sentence = None
        if done.timed is not None:
            one_s = done.timed.own_s / done.timed.own_rows * done.timed.num_rows
            sentence = advice_on_rows(done.timed.total_s, one_s, layout)
        elif done.meter is not None and layout.batch == 1:
            rate = self.shared.pool.link_bytes_per_s or float("inf")
            sentence = advice(done.meter.measured(done.num_tokens, rate), layout)
        if sentence is None:
            return
        if self.config.is_explicit:
            self.run.note(sentence)
        else:
            self.stop_sharing(f"{sentence}. workers=0 uses one device from here on")

    def section(self) -> Section:
        if self.shared is not None:
            self.counts.seconds = self._meter.seconds()
            self.counts.bytes_sent = self._meter.bytes_sent()
            self.counts.link_bytes_per_s = self.shared.pool.link_bytes_per_s
            self.counts.lanes = self._distributor.lanes
            if self.counts.shared:
                self.counts.memory = self.shared.pool.end_run()
        return section(self.counts)

    def close(self) -> None:
        """Drop what the run kept, here and on the workers."""
        shared, self.shared = self.shared, None
        if shared is None:
            return
        self._distributor.close()
        if not self.counts.shared:
            return
        if any(worker.run == self.run.id for worker in shared.pool.workers):
            shared.pool.end_run()
        busy = shared.busy_devices()
        if busy:
            shared.pool.park(devices=busy)
