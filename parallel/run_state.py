"""Sequence parallel during one sampling run: which calls of the network are shared, and how.

Every call that cannot be shared runs on rank 0 alone and is counted with its reason. Works on a
Pool and on what apply.py found out about the MODEL; touches no ComfyUI.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..backends.calls import CALL, ModelCall
from ..backends.report import Section
from ..backends.run import Run
from . import block_cache
from .attention import SharedAttention, options_of_part
from .bind import Bound, bind
from .comm import TransportError
from .config import SequenceParallelConfig, choose_layout
from .control import local_control
from .cost import Meter, advice
from .engine import Call
from .hooks import installed
from .launcher import StartFailed
from .mesh import Layout, Links
from .messages import Forward
from .network_call import NetworkCall
from .report import Counts, section
from .route import BRANCH, Baton, Cancelled
from .runs import CallFacts, RunFacts
from .shards import PlanError
from .shared import OVERRIDE, Alone, BeginAgain, Shared
from .wire import Meta, Unsupported, decode, encode
from .workers import WorkerError

_DROPPED = ("wrappers", "callbacks", OVERRIDE, "patches", "patches_replace")
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
        self.layout: Layout | None = None
        self.baton: Baton | None = None  # while two branches run
        self.decisions = block_cache.Decisions()
        self.counts = Counts(workers=len(shared.devices) if shared else 1)
        self._bound: dict[int, Bound] = {}
        self._is_attached = False
        if shared is not None:
            self.counts.devices = shared.devices
            self._meter = Meter(shared.pool.clock_of(shared.device))

    @property
    def keeps_tensors(self) -> bool:
        """Whether calls are shared: what is cut and exchanged outlives blocks."""
        return self.shared is not None

    # --- layout

    def choose(self, num_conds: int) -> Layout | None:
        """The layout for the calls of an evaluation of so many conditionings; None: one device."""
        self._attach_cache()
        self.layout = None
        if self.shared is not None and not self.reason:
            self.layout = choose_layout(
                self.config,
                world=len(self.shared.devices),
                num_conds=num_conds,
                num_heads=self.shared.num_heads,
            )
        return self.layout

    def stop_sharing(self, reason: str) -> None:
        """No further call of this run is shared."""
        self.reason = reason
        self.layout = None
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

    def prepare(self, call: ModelCall, network: torch.nn.Module, options: dict[str, Any]) -> None:
        """Note in `call` how many ranks will share it, before a block cache decides about it."""
        layout = self.layout or self.choose(1)
        is_shared = layout is not None and self.refusal(network, options) is None
        call.num_ranks = layout.ranks if layout is not None and is_shared else 1

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
        layout = self.layout or self.choose(1)
        reason = self.refusal(network, call.options)
        if reason is not None:
            raise Alone(reason)
        assert self.shared is not None
        assert layout is not None
        plan = self.shared.plan
        if layout.ranks == 1 and self.baton is None:
            raise Alone("one conditioning: cfg has nothing to split")
        reason = plan.refuse and plan.refuse(call.arguments, call.options)
        if reason:
            raise Alone(reason)
        try:
            encoded, tensors = call.encode(plan.rebuilt, dropped=_DROPPED)
        except Unsupported as error:
            raise Alone(f"{error}, which cannot travel") from None
        try:
            with self._barrier():
                has_workers = self._have_workers(call.options[CALL], tensors[0].shape)
                if has_workers:
                    links, message = self._message(layout, call, method, encoded, tensors)
                    if call.options.get(BRANCH):
                        out = self._remote(links, message, tensors)
                    else:
                        out = self._together(links, message, tensors, call, executor)
        except (PlanError, StartFailed) as error:
            if self.baton is not None:
                raise  # the pair of branches is repeated on one device
            if isinstance(error, StartFailed) and self.config.is_explicit:
                raise
            reason = str(error) if isinstance(error, PlanError) else no_workers(error)
            self.stop_sharing(reason)
            raise Alone(reason) from None
        if not has_workers:
            raise BeginAgain("")
        self.counts.shared += 1
        self.counts.layouts[layout] = self.counts.layouts.get(layout, 0) + 1
        return out

    def _have_workers(self, call: ModelCall, shape: Sequence[int]) -> bool:
        """Whether workers can join this call, which a block cache may have decided about already.

        Starts new ones where some are gone.
        """
        shared = self.shared
        assert shared is not None
        if self.baton is not None and self.baton.is_cancelled:
            raise Cancelled  # nothing may be repaired before the fault has been dealt with
        if self._are_ready():
            return True
        is_too_late = self.counts.shared > 0 and self.decisions.lost(call)
        shared.pool.prepare(
            shared.devices, shared.setting, shared.model, meanwhile=shared.meanwhile
        )
        self.begin_workers(shape)
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
            memory_bytes=shared.memory_bytes(shape) // self.least_ranks + self.groups_bytes,
            techniques=shared.techniques,
        )
        shared.pool.begin_run(shared.devices, shared.model, facts)

    @property
    def groups_bytes(self) -> int:
        """Of every device, for groups that the first shared call will make."""
        assert self.shared is not None
        return self.shared.pool.groups_bytes(self.shared.devices)

    @property
    def least_ranks(self) -> int:
        """Of the layouts that this run may choose: what every rank computes is divided by it."""
        assert self.shared is not None
        return min(
            choose_layout(
                self.config,
                world=len(self.shared.devices),
                num_conds=num_conds,
                num_heads=self.shared.num_heads,
            ).ranks
            for num_conds in (1, 2)
        )

    def _message(
        self,
        layout: Layout,
        call: NetworkCall,
        method: str,
        encoded: Any,
        tensors: list[torch.Tensor],
    ) -> tuple[Links, Forward]:
        """The groups and the Forward for a call."""
        shared = self.shared
        assert shared is not None
        links = shared.pool.links(layout, shared.setting, shared.device)
        now = call.options[CALL]
        facts = CallFacts.of(self.run, now, decisions=self.decisions.take_early(now))
        message = Forward(
            key=shared.model.load.key,
            groups=links.name,
            method=method,
            arguments=encoded,
            metas=[Meta.of(t).to_json() for t in tensors],
            call=encode(facts.to_dict(), []),
        )
        return links, message

    def _together(
        self,
        links: Links,
        message: Forward,
        tensors: list[torch.Tensor],
        call: NetworkCall,
        executor: Callable[..., Any],
    ) -> Any:
        """This process's part of a call that branch 0 shares."""
        shared = self.shared
        assert shared is not None
        if links.mesh is None:  # the branch is this process alone
            with links.clock.measure("call"):
                return call.run(executor)
        plan = shared.plan.for_call(call.arguments)
        if id(plan) not in self._bound:
            self._bound[id(plan)] = bind(plan, shared.network)
        part = Call(
            self._bound[id(plan)], links.mesh, links.clock, may_skip="cache" in shared.techniques
        )
        own = SharedAttention(part, call.options.get(OVERRIDE))
        local = call.with_(
            local_control(part, call.arguments),
            options_of_part(shared.network, call.options, own),
        )
        is_judged = self.counts.shared + 1 == _JUDGED_CALL
        meter = Meter(links.clock) if is_judged else None  # reading a clock waits for the device
        call.options[CALL].num_ranks = links.layout.ranks
        self.decisions.mesh = links.mesh
        try:
            with (
                links.clock.measure("call"),
                shared.pool.share(links, message, tensors, timeout_s=self.config.timeout_s),
                installed(part),
            ):
                out = local.run(executor)
        finally:
            self.decisions.mesh = None
        self.decisions.shared()
        if meter is not None:
            self._judge(links.layout, part, meter)
        return out

    def _remote(self, links: Links, message: Forward, tensors: list[torch.Tensor]) -> Any:
        """A call that branch 1 does without this process."""
        shared, baton = self.shared, self.baton
        assert shared is not None
        assert baton is not None
        over_since: list[float] = []

        def watch() -> None:
            if baton.is_cancelled:
                raise Cancelled
            if baton.first_is_over.is_set():
                over_since.append(time.monotonic())
                if time.monotonic() - over_since[0] > self.config.timeout_s:
                    raise TimeoutError

        found, received = shared.pool.remote(
            links, message, tensors,
            waiting=baton.released, meanwhile=watch, timeout_s=self.config.timeout_s,
        )  # fmt: skip
        return decode(found, received, device=shared.device)

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
        if self.baton is not None:
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

    def _judge(self, layout: Layout, part: Call, meter: Meter) -> None:
        """Say if one device would be faster, and use it from now on if nobody asked for more."""
        assert self.shared is not None
        rate = self.shared.pool.link_bytes_per_s or float("inf")
        sentence = advice(meter.measured(sum(part.lengths.values()), rate), layout)
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
            if self.counts.shared:
                self.counts.memory = self.shared.pool.end_run()
        return section(self.counts)

    def close(self) -> None:
        """Drop what the run kept, here and on the workers."""
        shared, self.shared = self.shared, None
        self._bound.clear()
        if shared is None or not self.counts.shared:
            return
        if any(worker.run == self.run.id for worker in shared.pool.workers):
            shared.pool.end_run()
        busy = shared.busy_devices()
        if busy:
            shared.pool.park(devices=busy)
