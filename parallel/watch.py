"""Ends waiting NCCL collectives when a peer is gone (unverified: it needs two GPUs).

A gloo collective fails by itself when a peer's socket closes. An NCCL kernel spins for ever, so a
thread looks at the workers during a shared call and aborts this process's groups.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .comm import NCCL
from .mesh import Links
from .workers import Worker

_PAUSE_S = 0.25
_SLACK = 10  # a call may take this many times the longest one so far before it counts as stuck


class Watch:
    """Watches shared calls; remembers how long the longest good one took."""

    def __init__(self) -> None:
        self._longest_s = 0.0

    @contextmanager
    def over(self, links: Links, members: Sequence[Worker], timeout_s: float) -> Iterator[None]:
        """Abort `links` if a member dies inside, or if it takes far longer than ever before."""
        if links.backend != NCCL:
            yield
            return
        over, started = threading.Event(), time.monotonic()
        limit_s = timeout_s + _SLACK * self._longest_s

        def look() -> None:
            while not over.wait(_PAUSE_S):
                if time.monotonic() - started > limit_s or not all(w.is_alive for w in members):
                    links.abort()
                    return

        thread = threading.Thread(target=look, name="slipstream-watch", daemon=True)
        thread.start()
        try:
            yield
            self._longest_s = max(self._longest_s, time.monotonic() - started)
        finally:
            over.set()
            thread.join()
