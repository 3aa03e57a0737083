"""How much longer than stated a wall-clock bound may take on this machine right now."""

import time


def patience() -> float:
    """1 on an idle machine, n where a busy thread gets one n-th of a core; at least 1.

    Bounds in seconds are promises for a machine that does nothing else; a shared one must not
    fail them for its neighbours' sake.
    """
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < 0.05:
        pass
    return max(1.0, (time.perf_counter() - wall) / (time.thread_time() - cpu))
