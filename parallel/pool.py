"""The worker processes of this ComfyUI: started once, kept warm, shared by all models.

`prepare` makes sure that the right workers run and have a model with its patches, `begin_run` has
them put it on their devices; `links` joins them in groups; `hand_over` gives a lane of them its
part of a model call. A fault inside any of these drops the groups, keeps the workers that answer
and raises the first cause; the next call goes on with new groups, and new workers where some were
lost.
"""

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .channel import ChannelClosed
from .comm import GLOO, NCCL, Clock, TransportError
from .crew import Crew, Setting
from .launcher import Launcher, LocalLauncher
from .mesh import Layout, Links
from .messages import (
    EndRun,
    Failed,
    Forward,
    Groups,
    Load,
    Measure,
    Message,
    Park,
    Patches,
    Ready,
    Unload,
)
from .runs import RunFacts
from .ticket import Ticket, hand_over
from .watch import Watch
from .wire import encode
from .workers import Meanwhile, Worker, WorkerError, ask, collect, is_there, recover

CheckLinks = Callable[[Sequence[str]], tuple[dict[str, str], str]]
_LOAD_TIMEOUT_S = 1800  # a worker that dies while it loads is noticed at once
_QUIET_TIMEOUT_S = 10
_MAX_GRACE_S = 10
_MAX_MODELS = 4
_PROBE_BYTES = {GLOO: 1 << 21, NCCL: 1 << 25}  # 2 MB do not fill the links that NCCL has
_COMMUNICATOR_BYTES = 300 << 20  # of the device, for each of NCCL's (assumed)
_NUM_COMMUNICATORS = 3  # main, and relay or heads and keys
log = logging.getLogger("slipstream")
WORKER_PROGRAM = Path(__file__).with_name("start_worker.py")


@dataclass(frozen=True)
class Model:
    """A model as workers know it. patches() is only called for a version they do not have.

    attributes, casts_weights: as in Patches.
    """

    load: Load
    version: str
    patches: Callable[[], tuple[Any, list[torch.Tensor], str]]  # encoded, tensors, sha256
    attributes: Any
    casts_weights: bool


class Pool:
    """Rank 0's workers. One thread at a time, but two branches may hand over calls of their own."""

    def __init__(
        self,
        launcher: Callable[[], Launcher] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
        check_links: CheckLinks = lambda devices: ({}, ""),
    ):
        self.crew = Crew(launcher or (lambda: LocalLauncher(WORKER_PROGRAM)))
        self._links: dict[tuple[Layout, float], Links] = {}  # by layout and timeout
        self._epoch = 0
        self._to_unload: set[str] = set()
        self._followed: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
        self._watch = Watch()
        self._is_cancelled, self._check_links = is_cancelled, check_links
        self._checked: set[tuple[str, ...]] = set()  # pairs of GPUs
        self.link_bytes_per_s: float | None = None
        self.row_seconds: dict[
            Hashable, list[float]
        ] = {}  # of each lane, as distribute.py measured
        self._clock = Clock(torch.device("cpu"))

    @property
    def workers(self) -> list[Worker]:
        return self.crew.workers

    def clock_of(self, device: torch.device) -> Clock:
        """The clock of all exchanges of this process, which only goes forward."""
        if self._clock.device != device:
            self._clock = Clock(device)
        return self._clock

    # --- workers and models

    def prepare(
        self,
        devices: Sequence[str],
        setting: Setting,
        model: Model,
        *,
        meanwhile: Meanwhile = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make devices[1:] the workers, with `model` loaded and patched.

        Costs one Ping where everything is in place. Raises WorkerError, StartFailed.
        """
        with self._guarded(setting.timeout_s):
            self._settle_loads(meanwhile)
            self._to_unload.discard(model.load.key)
            if self._to_unload:
                self.unload(self._to_unload.pop())
            if not self.workers:
                atexit.unregister(self.close)  # of workers that have all been lost
                atexit.register(self.close)
            self._check(devices)
            for _ in range(2):  # again if one has left between two prompts, just as it was asked
                if self.crew.require(devices[1:], setting, meanwhile=meanwhile, progress=progress):
                    self._drop_links()
                wanted = self.workers[: len(devices) - 1]
                left = [w for w in wanted if not is_there(w, setting.timeout_s, meanwhile)]
                if not left:
                    break
            self._load(wanted, model, meanwhile)

    def _check(self, devices: Sequence[str]) -> None:
        """Before anything of NCCL runs in this process or in new workers, which inherit."""
        pair = tuple(devices[:2])
        if pair in self._checked or self._backend_of(devices) != NCCL:
            return
        environment, sentence = self._check_links(pair)
        os.environ.update(environment)
        if sentence:
            log.warning("%s", sentence)
        self._checked.add(pair)

    def groups_bytes(self, devices: Sequence[str]) -> int:
        """What groups that are still to be made will take of each device."""
        is_to_come = not self._links and self._backend_of(devices) == NCCL
        return _NUM_COMMUNICATORS * _COMMUNICATOR_BYTES if is_to_come else 0

    def begin_run(self, devices: Sequence[str], model: Model, facts: RunFacts) -> None:
        """Have the workers put the model on their devices, while this process does the same.

        Does not wait: `is_ready` does. After `prepare`.
        """
        for worker in self.workers[: len(devices) - 1]:
            if worker.run != facts.id and not worker.is_loading:
                worker.send(Ready(model.load.key, encode(facts.to_dict(), [])))
                worker.run, worker.is_loading = facts.id, True

    def _settle_loads(self, meanwhile: Meanwhile) -> None:
        """Wait for workers that still load for a run that has been given up."""
        for worker in [w for w in self.workers if w.is_loading and w.is_alive]:
            if isinstance(worker.answer(_LOAD_TIMEOUT_S, meanwhile=meanwhile), Failed):
                log.info("%s could not load for the run before", worker)
            worker.is_loading, worker.run = False, None

    def is_ready(
        self,
        devices: Sequence[str],
        setting: Setting,
        model: Model,
        run: int,
        *,
        meanwhile: Meanwhile = None,
    ) -> bool:
        """Whether all workers have the model on their devices for this run; waits while they load.

        Asks who may be about to end for idleness. Raises WorkerError for one that failed to load.
        """
        wanted = self.workers[: len(devices) - 1]
        for worker in wanted:
            if worker.is_loading and worker.is_alive:
                with self._guarded(setting.timeout_s):
                    collect([worker], timeout_s=_LOAD_TIMEOUT_S, meanwhile=meanwhile)
        return len(wanted) == len(devices) - 1 and all(
            worker.device == device
            and worker.is_alive
            and worker.run == run
            and worker.models.get(model.load.key) == model.version
            and not (worker.may_have_left and not is_there(worker, setting.timeout_s, meanwhile))
            for worker, device in zip(wanted, devices[1:], strict=True)
        )

    def _load(self, workers: list[Worker], model: Model, meanwhile: Meanwhile) -> None:
        key = model.load.key
        lacking = [w for w in workers if key not in w.models]
        for worker in lacking:
            if len(worker.models) >= _MAX_MODELS:  # the first one is the least recently used
                oldest = next(iter(worker.models))
                ask([worker], Unload(oldest), timeout_s=_LOAD_TIMEOUT_S, meanwhile=meanwhile)
                del worker.models[oldest]
        ask(lacking, model.load, timeout_s=_LOAD_TIMEOUT_S, meanwhile=meanwhile)
        for worker in lacking:
            worker.models[key] = None
        outdated = [w for w in workers if w.models[key] != model.version]
        if outdated:
            encoded, tensors, digest = model.patches()
            message = Patches(key, model.version, encoded, model.attributes, model.casts_weights)
            facts = ask(outdated, message, tensors, timeout_s=_LOAD_TIMEOUT_S, meanwhile=meanwhile)
            for worker, found in zip(outdated, facts, strict=True):
                if found["sha256"] != digest:
                    raise WorkerError(f"{worker} did not get the model's patches as they are")
                worker.models[key] = model.version
        for worker in workers:  # now the most recently used
            worker.models[key] = worker.models.pop(key)

    # --- groups

    def links(self, layout: Layout, setting: Setting, device: torch.device) -> Links:
        """This process's groups under `layout`, made if need be. Raises WorkerError."""
        found = self._links.get((layout, setting.timeout_s))
        if found is not None:
            return found
        with self._guarded(setting.timeout_s):
            if not self._links:
                self._epoch += 1
            degrees = layout.degrees
            name = "-".join(map(str, (self._epoch, *degrees, setting.timeout_s)))
            path = str(self.crew.folder / f"store-{name}")
            members = self.workers[: layout.world - 1]
            backend = self._backend_of([str(device), *(w.device for w in members)])
            for process, worker in enumerate(members, 1):
                worker.send(
                    Groups(self._epoch, name, path, process, degrees, backend, setting.timeout_s)
                )
            links = self._links[layout, setting.timeout_s] = Links(
                layout, 0, dist.FileStore(path, layout.world), name=name,
                backend=backend, timeout_s=setting.timeout_s, clock=self.clock_of(device),
            )  # fmt: skip
            with self._watched(links, members, setting.timeout_s):
                collect(members, timeout_s=setting.timeout_s)
                self._measure(links, name, setting)
        return links

    def _watched(
        self, links: Links, members: Sequence[Worker], timeout_s: float | None
    ) -> AbstractContextManager[None]:
        return self._watch.over(
            links, members, epoch=self._epoch, timeout_s=timeout_s, is_cancelled=self._is_cancelled
        )

    def _backend_of(self, devices: Sequence[str]) -> str:
        on_gpus = all(device != "cpu" for device in devices)
        return NCCL if on_gpus and dist.is_nccl_available() and os.name != "nt" else GLOO

    def _measure(self, links: Links, name: str, setting: Setting) -> None:
        """Speed of the links between the ranks of lane 0."""
        if links.mesh is None or self.link_bytes_per_s is not None:
            return
        members = self.workers[: links.layout.ranks - 1]
        num_bytes = _PROBE_BYTES[links.backend]
        for worker in members:
            worker.send(Measure(name, num_bytes))
        self.link_bytes_per_s = links.mesh.measure(num_bytes)
        collect(members, timeout_s=setting.timeout_s)

    def _drop_links(self) -> None:
        for links in self._links.values():
            links.close()
        self._links.clear()
        self._watch.forget()

    # --- calls

    def over(
        self, links: Links, lanes: Iterable[int], *, timeout_s: float | None
    ) -> AbstractContextManager[None]:
        """Around one call of these lanes, from its first byte to its last result."""
        members = [worker for lane in lanes for worker in self._members(links, lane)]
        return self._watched(links, members, timeout_s)

    def hand_over(
        self, links: Links, lane: int, message: Forward, tensors: Sequence[torch.Tensor]
    ) -> Ticket:
        """Give a lane its part of a call, inside `over`; it begins at once."""
        return hand_over(links, lane, self._members(links, lane), message, tensors)

    def settle(self) -> None:
        """Wait until the device has done its part of all shared calls. Raises TransportError."""
        self._watch.settle()

    def _members(self, links: Links, lane: int) -> list[Worker]:
        return [self.workers[p - 1] for p in links.layout.members(lane) if p > 0]

    @contextmanager
    def recovered(self, timeout_s: float) -> Iterator[None]:
        """On any exception inside, bring the workers back to a state from which to go on."""
        with self._guarded(timeout_s):
            yield

    @contextmanager
    def _guarded(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            cause = self._recover(error, timeout_s)
            if cause is error:
                raise
            raise cause from error

    def _recover(self, error: BaseException, timeout_s: float) -> BaseException:
        self._drop_links()
        for worker in self.workers:
            worker.handle.abort(self._epoch)
        cause, lost = recover(
            self.workers, error, grace_s=min(timeout_s, _MAX_GRACE_S), timeout_s=timeout_s
        )
        self.crew.drop(lost)
        return cause

    # --- ends

    def end_run(self) -> list[dict[str, Any]]:
        """Tell the workers that a sampling run is over; what each says of its memory (Ping).

        Who still loads is not asked: the next run ends this one.
        """
        facts = self._tell_quietly([w for w in self.workers if not w.is_loading], EndRun())
        for worker in self.workers:
            for line in worker.handle.news():
                log.warning("worker %s: %s", worker.number, line)
        return facts

    def _tell_quietly(self, workers: Sequence[Worker], message: Message) -> list[Any]:
        """Outside of a run nobody could be shown a fault: a lost worker is replaced later."""
        try:
            return ask(workers, message, timeout_s=_QUIET_TIMEOUT_S)
        except (ChannelClosed, TimeoutError, WorkerError, TransportError) as error:
            log.info("%s", self._recover(error, _QUIET_TIMEOUT_S))
            return []

    def park(self, key: str = "", *, devices: Sequence[str] | None = None) -> None:
        """Take a model ("": all) off the workers' devices (or these of them); it stays loaded.

        Busy workers are left as they are.
        """
        if any(w.num_owed for w in self.workers):
            return
        having = [
            worker
            for worker in self.workers
            if (key in worker.models or (not key and worker.models))
            and (devices is None or worker.device in devices)
        ]
        self._tell_quietly(having, Park(key))

    def follow(self, model: Any, key: str) -> None:
        """Drop the model on all workers too, at the next opportunity, when `model` is freed."""
        keys = self._followed.setdefault(model, set())
        if key not in keys:
            keys.add(key)
            weakref.finalize(model, self._to_unload.add, key)

    def unload(self, key: str) -> None:
        """Drop a model, and freed ones, on all workers; later, if they are busy."""
        self._to_unload.add(key)
        if any(w.num_owed for w in self.workers):
            return
        in_use = set().union(*self._followed.values()) - {key}
        keys = self._to_unload - in_use
        self._to_unload.clear()
        for one in keys:
            having = [w for w in self.workers if one in w.models]
            self._tell_quietly(having, Unload(one))
            for worker in having:
                worker.models.pop(one, None)

    def close(self) -> None:
        """End all workers; done at exit too, since groups must go before CUDA does."""
        atexit.unregister(self.close)
        self._drop_links()
        self.crew.close()
