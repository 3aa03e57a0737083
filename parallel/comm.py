"""Process groups that move bytes, and the one exchange that everything is built from.

Groups are built directly on a store: no default group, no environment, remade at will. Tensors
travel as bytes, so that every dtype works on gloo and NCCL alike, and uneven parts need no
padding. A failed transport raises TransportError, which is a symptom: the cause is in some
process. Only one attribute holds a process group, because destroying the object is what makes
blocked gloo peers fail at once (torch 2.11: abort() and shutdown() leave them waiting).
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..backends.compiler import unrecorded
from ..backends.errors import SlipstreamError

GLOO, NCCL = "gloo", "nccl"
_MAX_EVENTS = 512
# Torch's own watchdog writes dumps, sleeps for minutes and ends the process at a collective's
# timeout (ProcessGroupNCCL, torch 2.11: Watchdog::runLoop, HeartbeatMonitor::runLoop), and
# rethrows CUDA errors in its thread. ComfyUI's process must live: watch.py decides about time.
# Read when a group is built.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
}
_NCCL_TIMEOUT = timedelta(days=10)  # longer than the watchdog will ever have to look


class TransportError(SlipstreamError, RuntimeError):
    """A peer is gone, or did not answer in time."""


class Clock:
    """Seconds per kind of waiting on one device, and bytes sent; CUDA is timed by events.

    is_timing: False where nobody reads the seconds, as on workers.
    """

    def __init__(self, device: torch.device, *, is_timing: bool = True):
        self.device, self.is_timing = device, is_timing
        self.bytes_sent = 0
        self._seconds: dict[str, float] = {}
        self._events: deque[tuple[str, Any, Any]] = deque()

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time inside to `kind`."""
        if not self.is_timing:
            yield
            return
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((kind, start, end))
            if len(self._events) > _MAX_EVENTS:
                self._fold()
            return
        started = time.perf_counter()
        yield
        self._add(kind, time.perf_counter() - started)

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by kind so far; waits for the device."""
        for *_, end in self._events:
            end.synchronize()
        self._fold()
        return dict(self._seconds)

    def _fold(self) -> None:
        """Add up what the device has done; events of work under way stay."""
        while self._events and self._events[0][-1].query():
            kind, start, end = self._events.popleft()
            self._add(kind, start.elapsed_time(end) / 1000)


class StopWatch:
    """Seconds since it was made until a device has done what it was given; None if it is None."""

    def __init__(self, device: torch.device | None):
        self._device = device
        self._started = self._now()

    def _now(self) -> float:
        if self._device is not None:
            synchronize(self._device)
        return time.perf_counter()

    def seconds(self) -> float | None:
        return None if self._device is None else self._now() - self._started


class Pending:
    """An exchange under way. `wait` gives the tensors from every rank, in rank order."""

    def __init__(
        self, group: "Group", flat: torch.Tensor, shapes: Sequence[Sequence[int]], keep: Any
    ):
        self._group, self._flat, self._shapes, self._keep = group, flat, shapes, keep

    def wait(self) -> list[torch.Tensor]:
        _wait(self._group.works.pop(id(self), None))
        self._group.check()
        self._keep = None
        sizes = [torch.Size(shape).numel() for shape in self._shapes]
        parts = self._flat.split(sizes)
        return [part.view(*shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def joined(self, dim: int) -> torch.Tensor:
        """All tensors joined along `dim`: without a copy where the memory already lies so."""
        parts = self.wait()
        shape = list(self._shapes[0])
        if all(size == 1 for size in shape[:dim]):
            shape[dim] = sum(s[dim] for s in self._shapes)
            return self._flat.view(*shape)
        return torch.cat(parts, dim)


class Group:
    """One process group of `world` ranks under `name` in the store. close() frees its peers."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        *,
        rank: int,
        world: int,
        backend: str,
        timeout_s: float,
        clock: Clock,
    ):
        self.rank, self.world, self.backend, self.clock = rank, world, backend, clock
        self.works: dict[int, Any] = {}  # of the Pendings; a work keeps its group's sockets open
        self._is_aborted = False
        build = _gloo if backend == GLOO else _nccl
        try:
            self._group: Any = build(
                dist.PrefixStore(name, store), rank, world, timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            raise TransportError(f"group {name} of {world} ranks: {error}") from error

    def close(self) -> None:
        self.abort()
        self.works.clear()
        self._group = None

    def abort(self) -> None:
        """End this rank's own waiting collectives, from any thread (NCCL only, unverified).

        Its peers must do the same: an NCCL kernel does not notice that another one is gone. What
        the collectives were to fill is void.
        """
        group = self._group
        if group is not None and self.backend == NCCL and not self._is_aborted:
            self._is_aborted = True
            group.abort()

    def check(self) -> None:
        """Raise TransportError if the group was closed or aborted."""
        if self._group is None or self._is_aborted:
            raise TransportError(f"the group was {'aborted' if self._is_aborted else 'closed'}")

    def _call(self, method: str, *args: Any) -> Any:
        self.check()
        try:
            return getattr(self._group, method)(*args)
        except RuntimeError as error:
            raise TransportError(f"{method}: {error}") from error

    def broadcast(self, tensor: torch.Tensor, *, root: int) -> None:
        """Fill `tensor` (contiguous) with root's values."""
        if tensor.numel():
            _wait(self._call("broadcast", as_bytes(tensor), root))
            if self.rank == root:
                self.clock.bytes_sent += tensor.nbytes * (self.world - 1)

    def send(self, tensor: torch.Tensor, *, to: int, patience_s: float | None = None) -> None:
        """Send a contiguous tensor to one rank, which must `recv` it.

        patience_s: how long it may be until that rank does, instead of the group's timeout.
        """
        # gloo's send and recv read the address as the CPU's, whatever device it belongs to
        staged = tensor.cpu() if self._stages(tensor) else tensor
        longer = patience_s if self.backend == GLOO else None  # NCCL's wait would block for it
        _wait(self._call("send", [as_bytes(staged)], to, 0), longer)
        self.clock.bytes_sent += tensor.nbytes

    def recv(self, tensor: torch.Tensor, *, source: int) -> None:
        """Fill a contiguous tensor from one rank."""
        if not self._stages(tensor):
            _wait(self._call("recv", [as_bytes(tensor)], source, 0))
            return
        staged = torch.empty(tensor.shape, dtype=tensor.dtype)
        _wait(self._call("recv", [as_bytes(staged)], source, 0))
        tensor.copy_(staged)

    def _stages(self, tensor: torch.Tensor) -> bool:
        return self.backend == GLOO and tensor.device.type != "cpu"

    def exchange(
        self, parts: Sequence[torch.Tensor | None], shapes: Sequence[Sequence[int] | None]
    ) -> Pending:
        """Start to send parts[r] to rank r and to receive a tensor of shapes[r] from it.

        None stands for nothing. At least one of a rank's parts and shapes must be given, and all
        tensors have one dtype and device. Sends the bytes of the parts for other ranks.
        """
        sample = next(part for part in parts if part is not None)
        sends = [0 if part is None else part.numel() for part in parts]
        wanted = [(0,) if shape is None else shape for shape in shapes]
        receives = [torch.Size(shape).numel() for shape in wanted]
        with unrecorded():  # the transport's own threads may hold both longer than a block runs
            flat_in, flat_out = sample.new_empty(sum(sends)), sample.new_empty(sum(receives))
        for part, place in zip(parts, flat_in.split(sends), strict=True):
            if part is not None:
                place.view(part.shape).copy_(part)
        size = sample.element_size()
        pending = Pending(self, flat_out, wanted, flat_in)
        self.works[id(pending)] = self._call(
            "alltoall_base",
            as_bytes(flat_out),
            as_bytes(flat_in),
            [n * size for n in receives],
            [n * size for n in sends],
        )
        self.clock.bytes_sent += (sum(sends) - sends[self.rank]) * size
        return pending


class Marker:
    """A place in the work that a device was given: done once the device has come to it."""

    def __init__(self, device: torch.device):
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def is_done(self) -> bool:
        """A device that has failed counts as done: whoever waits for it is told."""
        try:
            return self._event is None or self._event.query()
        except RuntimeError:
            return True


def synchronize(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8 [nbytes].

    One element is contiguous with any stride (0 where it was expanded), which a view to bytes
    would not take.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _wait(work: Any, timeout_s: float | None = None) -> None:
    if work is None:
        raise TransportError("the group was closed")
    try:
        work.wait() if timeout_s is None else work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TransportError(str(error)) from error
    finally:
        del work  # a frame of a traceback must not keep it


def _gloo(store: dist.Store, rank: int, world: int, timeout: timedelta) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world, options)


def _nccl(store: dist.Store, rank: int, world: int, timeout: timedelta) -> Any:
    """Unverified: nobody has run it. `timeout` is for watch.py, not for torch's watchdog."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _NCCL_TIMEOUT
    before = {name: os.environ.get(name) for name in NCCL_ENVIRONMENT}
    os.environ.update(NCCL_ENVIRONMENT)
    try:
        return dist.ProcessGroupNCCL(store, rank, world, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
