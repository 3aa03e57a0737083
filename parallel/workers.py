"""Rank 0's view of its worker processes: ask, wait, recover, and the sentence for what went wrong.

A worker answers every message once. After a fault its open answers are collected: who answers
stays, who does not is killed and named.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..backends.errors import SlipstreamError
from .channel import ChannelClosed
from .comm import TransportError
from .launcher import Handle
from .messages import (
    ERROR,
    MEMORY,
    PLAN,
    TRANSPORT,
    Done,
    EndRun,
    Exit,
    Failed,
    Message,
    Park,
    Patches,
    Ping,
    Unload,
)
from .shards import PlanError

log = logging.getLogger("slipstream")

Meanwhile = Callable[[], None] | None


class WorkerError(SlipstreamError, RuntimeError):
    """A worker failed, died or hangs: what the node shows."""


class WorkerOutOfMemory(WorkerError, torch.OutOfMemoryError):  # noqa: N818
    """A worker's device is full. ComfyUI clears memory for an OutOfMemoryError of torch."""


_END_OF_RUN = (Patches, EndRun, Park, Unload)


class Worker:
    """One worker: where it is, what it has loaded, how many answers it owes."""

    def __init__(self, handle: Handle, device: str, *, idle_s: float = 0):
        self.handle, self.device, self.idle_s = handle, device, idle_s
        self.number = self.num_owed = 0
        self._last_sent = time.monotonic()
        self.is_started = False  # it has become a ComfyUI
        self.models: dict[str, str | None] = {}  # key -> version of its patches
        self.run: int | None = None  # what it is ready for, or getting ready
        self.is_loading = False  # an answer to Ready is awaited, which may take minutes
        self.is_watched = False  # another thread reads its answers meanwhile
        self._answers: deque[Done | Failed] = deque()  # read, not yet asked for
        self._arrived = threading.Condition()

    def __str__(self) -> str:
        return f"Worker {self.number} ({self.device})"

    @property
    def is_alive(self) -> bool:
        return self.handle.exit_code() is None

    @property
    def may_have_left(self) -> bool:
        """Whether it has been silent so long that it may be about to end for idleness."""
        return bool(self.idle_s) and time.monotonic() - self._last_sent > self.idle_s / 2

    def send(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        if isinstance(message, _END_OF_RUN):
            self.run = None
        self.num_owed += 1
        self._last_sent = time.monotonic()
        self.handle.channel.send(message, tensors)

    def answer(self, timeout_s: float | None, *, meanwhile: Meanwhile = None) -> Done | Failed:
        """Its next answer. Raises TimeoutError, ChannelClosed."""
        if self.is_watched:
            self._await(timeout_s, meanwhile)
        with self._arrived:
            message = self._answers.popleft() if self._answers else None
            if message is None and self.is_watched:
                raise ChannelClosed(f"{self} is gone")
        if message is None:
            message = self._read(timeout_s, meanwhile)
        self.num_owed -= 1
        if isinstance(message, Failed):
            self.run = None
        return message

    def _read(self, timeout_s: float | None, meanwhile: Meanwhile = None) -> Done | Failed:
        message, _ = self.handle.channel.recv(timeout_s, meanwhile=meanwhile)
        assert isinstance(message, (Done, Failed)), message
        return message

    def _await(self, timeout_s: float | None, meanwhile: Meanwhile) -> None:
        """Until the thread that watches has read an answer, or finds the worker gone."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._arrived:
            while not self._answers and self.is_watched and self.is_alive:
                self._arrived.wait(0.1)
                if meanwhile is not None:
                    meanwhile()
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError

    def has_failed(self) -> bool:
        """For the thread that watches: takes in what has come; whether that is a failure."""
        with self._arrived:
            while self.is_watched and len(self._answers) < self.num_owed:
                if not self.handle.channel.has_news:
                    break
                try:
                    self._answers.append(self._read(0))
                except (ChannelClosed, TimeoutError):
                    return True
                self._arrived.notify_all()
            return any(isinstance(answer, Failed) for answer in self._answers)

    def kill(self) -> None:
        self.handle.kill()

    def exit(self) -> None:
        """Ask it to end, and see to it."""
        try:
            self.handle.channel.send(Exit())
            deadline = time.monotonic() + 1
            while self.is_alive and time.monotonic() < deadline:
                time.sleep(0.01)
        except ChannelClosed:
            pass
        self.kill()

    def death(self) -> str:
        """The sentence for a worker that ended by itself."""
        deadline = time.monotonic() + 1  # the connection may break before the process is reaped
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self.handle.exit_code()
        often = " (often out of memory)" if code in (-9, 137) else ""
        tail = self.handle.log_tail()
        shown = f" Last log lines:\n{tail}" if tail else ""
        return f"{self} ended with code {code}{often}. The next prompt starts a new one.{shown}"


def ask(
    workers: Iterable[Worker],
    message: Message,
    tensors: Sequence[torch.Tensor] = (),
    *,
    timeout_s: float,
    meanwhile: Meanwhile = None,
) -> list[Any]:
    """The facts of every worker's answer to `message`. Raises WorkerError, or as `answer` does."""
    asked = list(workers)
    for worker in asked:
        worker.send(message, tensors)
    return collect(asked, timeout_s=timeout_s, meanwhile=meanwhile)


def is_there(worker: Worker, timeout_s: float, meanwhile: Meanwhile) -> bool:
    """Whether it answers; False if it is gone, which is no fault: it had nothing to do."""
    try:
        ask([worker], Ping(), timeout_s=timeout_s, meanwhile=meanwhile)
    except ChannelClosed:
        worker.kill()
        return False
    return True


def collect(
    workers: Iterable[Worker], *, timeout_s: float, meanwhile: Meanwhile = None
) -> list[Any]:
    """The facts of every worker's next answer. Raises what a Failed one stands for."""
    facts = []
    for worker in workers:
        answer = worker.answer(timeout_s, meanwhile=meanwhile)
        worker.is_loading = False
        if isinstance(answer, Failed):
            raise failure(worker, answer)
        facts.append(answer.facts)
    return facts


def failure(worker: Worker, answer: Failed) -> Exception:
    """The exception for a worker's Failed."""
    if answer.cause == PLAN:
        return PlanError(answer.summary)
    if answer.cause == MEMORY:
        return WorkerOutOfMemory(
            f"{worker} has no memory left: {answer.summary}. Lower the size, or give "
            "Slipstream Layer Offload a budget: it holds for every worker."
        )
    if answer.cause == ERROR:
        return WorkerError(f"{worker} failed: {answer.summary}\n{answer.traceback}")
    return TransportError(f"{worker}: {answer.summary}")


def recover(
    workers: Iterable[Worker], error: BaseException, *, grace_s: float, timeout_s: float
) -> tuple[BaseException, list[Worker]]:
    """The first cause behind `error`, and the workers that were lost.

    Their groups must have been dropped, so that those that wait for this process fail at once.
    Raises nothing: whatever happens to a worker here is its loss.
    """
    lost: list[Worker] = []
    causes: list[BaseException] = []
    deadline = time.monotonic() + grace_s
    for worker in list(workers):
        if worker.is_loading and worker.is_alive:
            continue  # it is not in any exchange, and is asked before it is needed
        try:
            while worker.num_owed:
                left = deadline - time.monotonic() if worker.is_started else 0
                answer = worker.answer(max(left, 0))
                if isinstance(answer, Failed) and answer.cause != TRANSPORT:
                    causes.append(failure(worker, answer))
            if not worker.is_alive:
                raise ChannelClosed
        except ChannelClosed:
            causes.append(WorkerError(worker.death()))
            lost.append(worker)
        except TimeoutError:
            causes.append(
                WorkerError(
                    f"{worker} did not answer for {timeout_s:g} s: raise timeout_s if a step is "
                    f"that slow. Last log lines:\n{worker.handle.log_tail()}"
                )
            )
            lost.append(worker)
    for worker in lost:
        worker.kill()
    is_symptom = isinstance(error, (TransportError, TimeoutError, ChannelClosed))
    if is_symptom and causes:
        return causes[0], lost
    if isinstance(error, TransportError):
        return WorkerError(
            f"The processes did not finish an exchange within {timeout_s:g} s: raise timeout_s if "
            f"a step is that slow, and look at the links with --doctor ({error})"
        ), lost
    if is_symptom:
        return WorkerError(f"A worker did not answer: {error}"), lost
    for cause in causes:
        log.info("besides: %s", cause)
    return error, lost
