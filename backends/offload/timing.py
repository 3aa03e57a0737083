"""Times on the device's own clock: marks on its compute stream, read when the device has passed.

Where a device has no events (and runs in order), a mark is the host's clock.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


class DeviceClock:
    """Marks on the current stream of one device."""

    def __init__(self, device: torch.device):
        api = torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
        self._event = getattr(api, "Event", None)

    def mark(self) -> Any:
        """Now, as the compute stream will see it."""
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to a later one; the caller has synchronized the device."""
        if self._event is None:
            return end - begin
        return begin.elapsed_time(end) / 1000.0


@dataclass(frozen=True)
class UnitTime:
    """One unit, averaged over the model calls it ran in: waiting for weights, then computing."""

    waiting: float
    computing: float


@dataclass
class BlockTimes:
    """What one step's model calls took, unit by unit. begin, ready, end: marks of one unit."""

    clock: DeviceClock
    num_calls: int = 0
    _marks: dict[int, list[tuple[Any, Any, Any]]] = field(default_factory=dict)

    def add(self, position: int, begin: Any, ready: Any, end: Any) -> None:
        self._marks.setdefault(position, []).append((begin, ready, end))

    def read(self) -> dict[int, UnitTime]:
        """Position -> time; the caller has synchronized the device."""
        seconds = self.clock.seconds
        return {
            position: UnitTime(
                waiting=_mean(seconds(begin, ready) for begin, ready, _ in marks),
                computing=_mean(seconds(ready, end) for _, ready, end in marks),
            )
            for position, marks in self._marks.items()
        }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
