"""Timed work never maps memory for its frames, at whatever call depth it starts."""

import mmap
import sys
from collections.abc import Callable

import pytest
from slipstream.bench.frame_room import with_room

resource = pytest.importorskip("resource")
NUM_CALLS = 500


def _nested(depth: int) -> int:
    return _nested(depth - 1) if depth else 0


def _loop() -> int:
    """Page faults of a loop whose calls go up and down ten frames, as a model's blocks do."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(NUM_CALLS):
        _nested(10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _at_depth(depth: int, work: Callable[[], int]) -> int:
    return _at_depth(depth - 1, work) if depth else work()


def _most_faults(work: Callable[[], int]) -> int:
    """Over call depths that span two 16 KB chunks of frames."""
    return max(_at_depth(depth, work) for depth in range(0, 400, 5))


def test_with_room_hands_on_results_and_errors():
    assert with_room(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)


def _counts_faults() -> bool:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as fresh:
        for page in range(64):
            fresh[page * mmap.PAGESIZE] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt > before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are not in chunks there")
def test_with_room_no_call_depth_maps_memory_in_a_loop():
    if not _counts_faults():
        pytest.skip("this system does not count page faults")
    assert _most_faults(_loop) >= NUM_CALLS  # somewhere the loop lies on a border
    assert _most_faults(lambda: with_room(_loop)) < NUM_CALLS // 2
