"""Rank 0's view of its worker processes: ask, wait, recover, and the sentence for what went wrong.

A worker answers every message once. After a fault its open answers are collected: who answers
stays, who does not is killed and named.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..backends.errors import SlipstreamError
from .channel import ChannelClosed
from .comm import TransportError
from .launcher import Handle
from .messages import ERROR, PLAN, Done, Exit, Failed, Message, Ping
from .shards import PlanError

log = logging.getLogger("slipstream")

Meanwhile = Callable[[], None] | None


class WorkerError(SlipstreamError, RuntimeError):
    """A worker failed, died or hangs: what the node shows."""


class Worker:
    """One worker: where it is, what it has loaded, how many answers it owes."""

    def __init__(self, handle: Handle, device: str, *, idle_s: float = 0):
        self.handle, self.device, self.idle_s = handle, device, idle_s
        self.number = self.num_owed = 0
        self._last_sent = time.monotonic()
        self.is_started = False  # it has become a ComfyUI
        self.models: dict[str, str | None] = {}  # key -> version of its patches

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
        self.num_owed += 1
        self._last_sent = time.monotonic()
        self.handle.channel.send(message, tensors)

    def answer(self, timeout_s: float | None, *, meanwhile: Meanwhile = None) -> Done | Failed:
        """Its next answer. Raises TimeoutError, ChannelClosed."""
        message, _ = self.handle.channel.recv(timeout_s, meanwhile=meanwhile)
        assert isinstance(message, (Done, Failed)), message
        self.num_owed -= 1
        return message

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
        if isinstance(answer, Failed):
            raise failure(worker, answer)
        facts.append(answer.facts)
    return facts


def failure(worker: Worker, answer: Failed) -> Exception:
    """The exception for a worker's Failed."""
    if answer.cause == PLAN:
        return PlanError(answer.summary)
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
        try:
            while worker.num_owed:
                left = deadline - time.monotonic() if worker.is_started else 0
                answer = worker.answer(max(left, 0))
                if isinstance(answer, Failed) and answer.cause in (PLAN, ERROR):
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
