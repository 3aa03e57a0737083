"""A worker's stdin, which rank 0 holds open: its end is the worker's, its lines reach it any time.

A thread reads it, because the worker's own may wait in a collective that only an abort ends.
"""

import os
import sys
import threading
from collections.abc import Callable

from .launcher import ABORT


class Lifeline:
    """Started before anything that takes time. on_abort: given the epoch of void groups."""

    def __init__(self) -> None:
        self.key = bytes.fromhex(sys.stdin.readline())
        self.on_abort: Callable[[int], None] | None = None
        threading.Thread(target=self._follow, name="slipstream-lifeline", daemon=True).start()

    def _follow(self) -> None:
        for line in sys.stdin:
            kind, _, epoch = line.partition(" ")
            if kind == ABORT and self.on_abort is not None:
                self.on_abort(int(epoch))
        os._exit(1)  # however rank 0 ended, and whatever this process is doing
