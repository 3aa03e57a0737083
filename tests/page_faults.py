"""Page faults of some work, and call depths to do it at."""

import mmap
from collections.abc import Callable

import pytest

DEPTHS = range(0, 400, 5)  # of small functions: two of Python's 16 KB chunks of frames


def num_faults(work: Callable[[], object]) -> int:
    """Minor page faults while `work` runs; skips the test where the system counts none."""
    resource = pytest.importorskip("resource")

    def count() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    before = count()
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as fresh:
        for page in range(64):
            fresh[page * mmap.PAGESIZE] = 1
    if count() == before:
        pytest.skip("this system does not count page faults")
    before = count()
    work()
    return count() - before


def at_depth(depth: int, work: Callable[[], int]) -> int:
    """work(), `depth` calls further down."""
    return at_depth(depth - 1, work) if depth else work()
