"""Room for Python's call frames, so that no run lies at an unlucky call depth.

CPython 3.11 and later keep frames in chunks of 16 KB, map one when a call crosses a chunk's end
and unmap it when that call returns (pystate.c, push_chunk). A loop over blocks that lies on such an
end takes page faults at every block, and wrappers like ours are what moves it there. Which call
depth is unlucky is chance, so benchmarks give plain runs the same room.
"""

import types
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_NUM_SLOTS = 40_000  # of 8 bytes: a frame of this size gets a chunk of 512 KB, mostly free


def _call(work: Callable[[], T]) -> T:
    return work()


_roomy = types.FunctionType(_call.__code__.replace(co_stacksize=_NUM_SLOTS), globals())


def with_room(work: Callable[[], T]) -> T:
    """work(), in a chunk whose end its calls do not reach: 190 KB of frames are about 1,000."""
    result: T = _roomy(work)
    return result
