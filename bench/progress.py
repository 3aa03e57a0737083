"""A line of progress: redrawn on a terminal, a line at the start and the end in a log."""

import sys
import time
from types import TracebackType

_WIDTH = 30


class Progress:
    """with Progress("Sampling") as progress: progress.show(done, total)"""

    def __init__(self, label: str):
        self.label = label
        self._is_terminal = sys.stdout.isatty()
        self._started = time.monotonic()
        self._drawn = (0, 0)

    def __enter__(self) -> "Progress":
        print(self.label, end="" if self._is_terminal else "\n", flush=True)
        return self

    def show(self, done: int, total: int) -> None:
        """`done` of `total` steps are over."""
        self._drawn = (done, total)
        if self._is_terminal:
            bar = ("#" * (done * _WIDTH // max(total, 1))).ljust(_WIDTH, "-")
            print(f"\r{self.label} [{bar}] {done}/{total}", end="", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        done, total = self._drawn
        seconds = time.monotonic() - self._started
        if self._is_terminal:
            print()
        if error is None:
            print(f"{done} of {total} steps, {seconds:.1f} s with loading", flush=True)
