"""CFG parallel: the two conditionings of an evaluation at the same time, on two branches.

The second one runs in a thread of its own, whose model call goes to the workers of branch 1. The
host's code is not made for threads (hooks, control nets, cast buffers), so a baton makes sure that
one thread runs at a time: the second goes first, hands its call over, and lets go of the baton
only while it waits for the answer.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..backends.errors import SlipstreamError

BRANCH = "slipstream.parallel.branch"  # transformer_options key: set in branch 1 of a routed pair


class Cancelled(SlipstreamError, RuntimeError):  # noqa: N818
    """The other branch failed."""


class Baton:
    """One thread runs at a time; `released` lets the other one run while this one waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.handed = threading.Event()  # the second branch has handed its call over, or ended
        self.is_cancelled = False  # either branch has failed
        self.first_is_over = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """Only inside `held`."""
        self.handed.set()
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


def can_route(conds: list[Any]) -> bool:
    """Whether the conditionings are two that do not depend on each other."""
    if len(conds) != 2 or any(not cond for cond in conds):
        return False
    return not any("hooks" in one or "default" in one for cond in conds for one in cond)


def run_both(
    baton: Baton,
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    device: torch.device,
    stop_first: Callable[[bool], None],
) -> tuple[Any, Any]:
    """Results of both; `second` in a thread. Raises the failure that came first.

    stop_first(True) makes a running `first` raise soon, stop_first(False) takes that back.
    """
    results: list[Any] = []
    failures: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()

    def run_second() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with baton.held(), torch.inference_mode(inference), torch.no_grad():
                results.append(second())
        except BaseException as error:  # noqa: BLE001 - raised below, in the prompt's thread
            failures.append(error)
            if not baton.first_is_over.is_set() and not baton.is_cancelled:
                baton.is_cancelled = True
                stop_first(True)
        finally:
            baton.handed.set()

    thread = threading.Thread(target=run_second, name="slipstream-branch-1", daemon=True)
    thread.start()
    baton.handed.wait()
    try:
        with baton.held():
            if failures:
                raise Cancelled
            one = first()
    except BaseException:
        if failures:  # it was stopped because the second branch failed
            raise failures[0] from None
        baton.is_cancelled = True
        raise
    finally:
        baton.first_is_over.set()
        thread.join()
        if failures:
            stop_first(False)
    if failures:
        raise failures[0]
    return one, results[0]
