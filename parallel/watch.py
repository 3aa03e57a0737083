"""The judge of time over groups whose waits do not block: NCCL's (unverified: it needs two GPUs).

A gloo collective fails by itself when a peer closes or is late. An NCCL kernel spins for ever and
its wait only orders streams: this process goes on, and is stuck wherever it next needs the device.
So a thread watches every shared call until the device has done it: it reads the workers' answers,
and ends the waiting here and there as soon as one of them fails, dies or is late.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from . import comm
from .comm import NCCL, TransportError
from .mesh import Links
from .workers import Worker

_PAUSE_S = 0.05
_CANCEL_S = 1.0  # a Cancel is raised where the next layer runs, unless this process is stuck
_SLACK = 10  # a call may take this many times the longest one so far before it counts as stuck


@dataclass(eq=False)
class _Call:
    """One watched call. end: what the device must come to, once this process has left the call."""

    links: Links
    epoch: int
    members: Sequence[Worker]
    limit_s: float | None
    started: float = field(default_factory=time.monotonic)
    cancelled: float | None = None
    end: comm.Marker | None = None
    failure: str = ""

    def abort(self, failure: str) -> None:
        self.failure = failure
        self.links.abort()
        for worker in self.members:
            worker.handle.abort(self.epoch)


class Watch:
    """Watches shared calls; remembers how long the longest good one took."""

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._calls: list[_Call] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure = ""  # of a call that this process had left

    @contextmanager
    def over(
        self,
        links: Links,
        members: Sequence[Worker],
        *,
        epoch: int,
        timeout_s: float | None,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[None]:
        """Watch one call, from its first byte until the device has done it. timeout_s None: no end.

        Raises TransportError if it, or the one before it, had to be aborted.
        """
        if links.backend != NCCL:
            yield
            return
        self.check()
        limit_s = None if timeout_s is None else timeout_s + _SLACK * self._longest_s
        call = _Call(links, epoch, members, limit_s)
        for worker in members:
            worker.is_watched = True
        self._begin(call, is_cancelled)
        try:
            yield
            call.end = comm.Marker(links.clock.device)
        except BaseException:
            self._drop(call)
            raise
        finally:
            for worker in members:
                worker.is_watched = False
        if call.failure:
            self._drop(call)
            raise TransportError(call.failure)

    def check(self) -> None:
        """Raise TransportError for a call that was aborted after this process had left it."""
        with self._changed:
            failure, self._failure = self._failure, ""
        if failure:
            raise TransportError(failure)

    def settle(self) -> None:
        """Wait until the device has done all calls. Raises TransportError as `check`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)
        self.check()

    def forget(self) -> None:
        """No call is watched any more: their groups are gone."""
        with self._changed:
            self._calls.clear()
            self._failure = ""
            self._changed.notify_all()

    def _begin(self, call: _Call, is_cancelled: Callable[[], bool]) -> None:
        with self._changed:
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._look, args=(is_cancelled,), name="slipstream-watch", daemon=True
                )
                self._thread.start()

    def _drop(self, call: _Call) -> None:
        with self._changed:
            if call in self._calls:
                self._calls.remove(call)
            self._changed.notify_all()

    def _look(self, is_cancelled: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                calls = list(self._calls)
                if not calls:
                    self._thread = None
                    return
            _wait_for_news({w for call in calls for w in call.members if w.is_watched})
            for call in calls:
                self._judge(call, is_cancelled)

    def _judge(self, call: _Call, is_cancelled: Callable[[], bool]) -> None:
        if call.failure:
            for worker in call.members:  # this process may be waiting for the answer
                worker.has_failed()
            return
        if call.end is not None and call.end.is_done():
            self._longest_s = max(self._longest_s, time.monotonic() - call.started)
            self._drop(call)
            return
        failure = _reason(call, is_cancelled)
        if not failure:
            return
        call.abort(failure)
        if call.end is not None:  # this process has left it
            with self._changed:
                self._failure = failure
            self._drop(call)


def _reason(call: _Call, is_cancelled: Callable[[], bool]) -> str:
    """Why a call must be aborted now, or nothing."""
    for worker in call.members:
        if call.end is None and worker.has_failed():
            return f"{worker} failed"
        if not worker.is_alive:
            return f"{worker} is gone"
    now = time.monotonic()
    if is_cancelled():
        call.cancelled = call.cancelled or now
        if now - call.cancelled > _CANCEL_S:
            return "the run was cancelled"
    if call.limit_s is not None and now - call.started > call.limit_s:
        return f"no end after {now - call.started:.0f} s"
    return ""


def _wait_for_news(workers: Collection[Worker]) -> None:
    """Until one of them answers, or for a short while."""
    if workers:
        try:
            wait([worker.handle.channel.waitable for worker in workers], _PAUSE_S)
            return
        except (OSError, ValueError):
            pass  # a channel was closed just now
    time.sleep(_PAUSE_S)
