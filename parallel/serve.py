"""The worker's side of every message: groups, models, its part of model calls.

Knows nothing of ComfyUI: `Models` (worker.py) loads and patches. One message at a time, one
answer to each; whatever goes wrong in between becomes a Failed with the traceback, and closes the
groups, so that peers that wait for this worker fail at once.
"""

import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..backends.architectures import Architecture, find, whole_sequence
from ..backends.architectures.plans import find_plan
from ..backends.architectures.tokens import TokenPlan
from .attention import SharedAttention, options_of_part
from .bind import Bound, bind
from .bundle import receive_bundle
from .channel import Channel, ChannelClosed
from .comm import Clock, Group, StopWatch, TransportError
from .control import local_control
from .engine import Call, EarlyExit
from .hooks import installed
from .mesh import Layout, Links
from .messages import (
    ERROR,
    MEMORY,
    PLAN,
    TRANSPORT,
    Done,
    EndRun,
    Exit,
    Failed,
    Forward,
    Groups,
    Load,
    Measure,
    Message,
    Park,
    Patches,
    Ping,
    Ready,
    Unload,
)
from .network_call import NetworkCall
from .runs import CallFacts, RunFacts, WorkerRun
from .shards import PlanError
from .wire import Meta, decode, encode

OVERRIDE = "optimized_attention_override"
_START_S = 120
_HAND_BACK_S = 86400  # rank 0 closes its groups before that if it will not take the output


class Model(Protocol):
    """A loaded and patched model."""

    network: torch.nn.Module

    def begin(self, facts: RunFacts, decide: Callable[[Any, bool], bool]) -> WorkerRun: ...


class Models(Protocol):
    """What this worker has loaded."""

    def load(self, message: Load) -> Any: ...

    def patch(self, message: Patches, tensors: list[torch.Tensor]) -> Any: ...

    def park(self, key: str) -> None: ...

    def unload(self, key: str) -> None: ...

    def facts(self) -> dict[str, Any]: ...

    def __getitem__(self, key: str) -> Model: ...


class Server:
    """Answers rank 0 until it goes away, says Exit, or is silent for idle_s (0: for ever).

    Before the first model is here, other workers may still be starting, which is no idleness.
    interrupt(True), from another thread, makes a running call of a network raise at its next
    operation; interrupt(False) takes that back.
    """

    def __init__(
        self,
        channel: Channel,
        models: Models,
        device: torch.device,
        idle_s: float,
        interrupt: Callable[[bool], None] = lambda value: None,
    ):
        self.channel, self.models, self.device, self.idle_s = channel, models, device, idle_s
        self.clock = Clock(device, is_timing=False)
        self._links: dict[str, Links] = {}
        self._epoch = 0
        self._bound: dict[tuple[int, int], Bound] = {}
        self._run: WorkerRun | None = None
        self._entry: Group | None = None  # of the latest call: rank 0 and this lane
        self._decisions: list[bool] = []
        self._has_worked = False
        self._interrupt, self._is_interrupted, self._is_computing = interrupt, False, False
        self._computing = threading.Lock()  # of the latter two

    def serve(self) -> None:
        """The message loop."""
        while True:
            try:
                message, tensors = self.channel.recv(self._patience_s)
            except (TimeoutError, ChannelClosed):
                return
            if isinstance(message, Exit):
                return
            try:
                if not self._answer(message, tensors):
                    return
            except ChannelClosed:
                return

    @property
    def _patience_s(self) -> float | None:
        if not self.idle_s:
            return None
        return self.idle_s if self._has_worked else self.idle_s + _START_S

    def _answer(self, message: Message, tensors: list[torch.Tensor]) -> bool:
        try:
            facts, output = self._handle(message, tensors)
        except Exception as error:  # noqa: BLE001 - reported to rank 0
            self._drop_links()
            cause = _cause(error)
            answer = Failed(cause, f"{type(error).__name__}: {error}", traceback.format_exc())
            if cause == PLAN:
                answer = Failed(cause, str(error), "")
            del error
            self._end_run()
            gc.collect()  # frames of the traceback
            self.channel.send(answer)
            return True
        self.channel.send(Done(facts))
        self._hand_back(message, output)
        return True

    def _handle(
        self, message: Message, tensors: list[torch.Tensor]
    ) -> tuple[Any, list[torch.Tensor]]:
        """Facts for the answer, and tensors that follow it over the groups."""
        match message:
            case Forward():
                with torch.inference_mode():
                    return self._forward(message)
            case Ready():
                self._end_run()
                facts = RunFacts(**decode(message.run, []))
                self._run = self.models[message.key].begin(facts, self._decide)
            case Groups():
                self._join(message)
            case Measure():
                mesh = self._links[message.groups].mesh
                assert mesh is not None
                mesh.measure(message.num_bytes)
            case Load():
                self._has_worked = True
                return self.models.load(message), []
            case Patches():
                self._end_run()
                return self.models.patch(message, tensors), []
            case EndRun():
                self._end_run()
                return self.models.facts(), []
            case Park():
                self._end_run()
                self.models.park(message.key)
            case Unload():
                self._end_run()
                self._bound.clear()
                self.models.unload(message.key)
            case Ping():
                return self.models.facts(), []
            case _:
                raise ValueError(f"a worker does not take {type(message).__name__}")
        return None, []

    # --- groups

    def _join(self, message: Groups) -> None:
        if message.epoch != self._epoch:
            self._drop_links()
            self._epoch = message.epoch
        batch, cfg, ulysses, ring = message.layout
        layout = Layout(batch=batch, cfg=cfg, ulysses=ulysses, ring=ring)
        self._links[message.name] = Links(
            layout, message.process, dist.FileStore(message.store, layout.world),
            name=message.name, backend=message.backend, timeout_s=message.timeout_s,
            clock=self.clock,
        )  # fmt: skip

    def _drop_links(self) -> None:
        for links in self._links.values():
            links.close()
        self._links.clear()

    def abort(self, epoch: int) -> None:
        """From another thread: free this one, should it wait in groups of `epoch` or compute.

        Nobody wants the rows of a lane any more, and they may take a minute.
        """
        if epoch != self._epoch:
            return
        for links in list(self._links.values()):
            links.abort()
        with self._computing:
            if self._is_computing:
                self._is_interrupted = True
                self._interrupt(True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        with self._computing:
            self._is_computing, self._is_interrupted = True, False
        try:
            yield
        except BaseException:  # ComfyUI's interrupt is no Exception
            if self._is_interrupted:
                raise TransportError("the call was given up") from None
            raise
        finally:
            with self._computing:
                self._is_computing = False
                if self._is_interrupted:
                    self._interrupt(False)

    # --- model calls

    def _forward(self, message: Forward) -> tuple[Any, list[torch.Tensor]]:
        links = self._links.get(message.groups)
        if links is None:
            raise TransportError(f"no groups {message.groups}")
        self._entry = links.entry(links.own_lane)
        tensors = receive_bundle(self._entry, [Meta.from_json(m) for m in message.metas])
        model = self.models[message.key]
        call = NetworkCall.decode(message.arguments, tensors, self.device)
        facts = CallFacts(**decode(message.call, []))
        self._decisions = list(facts.decisions)
        run = self._run
        assert run is not None, "Ready comes first"
        assert run.id == facts.run
        forward = self._part(model.network, message.method, links)
        clock = StopWatch(self.device if message.is_timed else None)
        with self._interruptible():
            out = run.call(facts, model.network, call, forward)
        seconds = clock.seconds()
        if links.own_lane == 0 or links.layout.rank(links.process) > 0:
            return None, []
        output: list[torch.Tensor] = []
        encoded = encode(out, output)
        output = [t.to(self.device).contiguous() for t in output]
        metas = [Meta.of(t).to_json() for t in output]
        return {"out": encoded, "metas": metas, "seconds": seconds}, output

    def _part(self, network: torch.nn.Module, method: str, links: Links) -> Callable[..., Any]:
        """This rank's part of network.method, to be run inside the techniques' wrappers."""
        function = getattr(network, method)
        mesh = links.mesh
        if mesh is None:
            return partial(_rows, function, find(network))

        def part(*args: Any, **kwargs: Any) -> Any:
            whole = NetworkCall.of(function, args, kwargs)
            call = Call(self._bind(network, whole.arguments), mesh, self.clock, may_skip=True)
            own = SharedAttention(call, whole.options.get(OVERRIDE))
            local = whole.with_(
                local_control(call, whole.arguments),
                options_of_part(network, whole.options, own),
            )
            with installed(call):
                try:
                    return local.run(function)
                except EarlyExit:
                    # Nobody reads it: a block cache around this must only see a tensor.
                    return torch.zeros((), device=self.device)

        return part

    def _bind(self, network: torch.nn.Module, arguments: dict[str, Any]) -> Bound:
        plan = find_plan(network)
        if not isinstance(plan, TokenPlan):
            raise PlanError(plan)
        plan = plan.for_call(arguments)
        key = (id(network), id(plan))
        if key not in self._bound:
            self._bound[key] = bind(plan, network)
        return self._bound[key]

    def _decide(self, call: Any, reuse: bool) -> bool:
        """Rank 0's decision of a block cache: known before the call, or sent within it."""
        if self._decisions:
            return self._decisions.pop(0)
        assert self._entry is not None
        flag = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self._entry.broadcast(flag, root=0)
        return bool(flag.item())

    def _end_run(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.close()

    def _hand_back(self, message: Message, output: list[torch.Tensor]) -> None:
        """Send a lane's output to rank 0, which may still be at its own part.

        A failure is rank 0's to notice.
        """
        if not isinstance(message, Forward):
            return
        links = self._links[message.groups]
        try:
            for tensor in output:
                links.entry(links.own_lane).send(tensor, to=0, patience_s=_HAND_BACK_S)
        except TransportError:
            self._drop_links()


def _rows(
    function: Callable[..., Any], architecture: Architecture | None, *args: Any, **kwargs: Any
) -> Any:
    """A call of a network on some rows of a batch: it may not use what it kept of others."""
    call = NetworkCall.of(function, args, kwargs)
    return call.with_(options=whole_sequence(architecture, call.options)).run(function)


def _cause(error: Exception) -> str:
    if isinstance(error, TransportError):
        return TRANSPORT
    if isinstance(error, PlanError):
        return PLAN
    # the driver's own "out of memory" comes as an AcceleratorError (torch 2.9 and later)
    is_full = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)
    return MEMORY if is_full else ERROR
