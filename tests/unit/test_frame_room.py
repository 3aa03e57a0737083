"""In a chunk with room no call maps memory for its frame, at whatever call depth it starts."""

import sys
from collections.abc import Callable

import pytest
from page_faults import DEPTHS, at_depth, num_faults
from slipstream.backends.frame_room import with_room

NUM_CALLS = 500


def _nested(depth: int) -> int:
    return _nested(depth - 1) if depth else 0


def _loop() -> None:
    """Calls that go up and down ten frames, as a model's blocks do."""
    for _ in range(NUM_CALLS):
        _nested(10)


def _most_faults(work: Callable[[], None]) -> int:
    return max(at_depth(depth, lambda: num_faults(work)) for depth in DEPTHS)


def test_with_room_hands_on_results_and_errors():
    assert with_room(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are not in chunks there")
def test_with_room_no_call_depth_maps_memory_in_a_loop():
    assert _most_faults(_loop) >= NUM_CALLS  # somewhere the loop lies on a chunk's end
    assert _most_faults(lambda: with_room(_loop)) < NUM_CALLS // 2
