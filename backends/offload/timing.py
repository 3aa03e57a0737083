"""Times on the device's own clock: marks on its compute stream, read when the device has passed.

Where a device has no events (and runs in order), a mark is the host's clock.
"""

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
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


@dataclass(frozen=True)
class Work:
    """What the model calls of a step computed, per call: equal for steps that can be compared.

    kinds: kind of a call -> its share of the calls; runs: how often each unit ran per call;
    is_whole: every unit ran, so no cache has left one out of the step.
    """

    kinds: frozenset[tuple[Hashable, Fraction]]
    runs: tuple[Fraction, ...]
    is_whole: bool


@dataclass
class BlockTimes:
    """What one step's model calls took, whole and unit by unit."""

    clock: DeviceClock
    _calls: list[tuple[Hashable, Any, Any]] = field(default_factory=list)  # kind, begin, end
    _marks: dict[int, list[tuple[Any, Any, Any]]] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """Model calls that have ended."""
        return len(self._calls)

    def add_call(self, kind: Hashable, begin: Any, end: Any) -> None:
        """kind: what makes the time of a call another one, such as its batch; begin, end: marks."""
        self._calls.append((kind, begin, end))

    def add(self, position: int, begin: Any, ready: Any, end: Any) -> None:
        """begin, ready, end: marks of one unit."""
        self._marks.setdefault(position, []).append((begin, ready, end))

    def call_seconds(self) -> float:
        """Mean of the model calls; the caller has synchronized the device."""
        return _mean(self.clock.seconds(begin, end) for _, begin, end in self._calls)

    def work(self, positions: Sequence[int]) -> Work:
        """positions: of the units, each module once."""
        kinds = Counter(kind for kind, _, _ in self._calls)
        runs = [len(self._marks.get(position, ())) for position in positions]
        return Work(
            kinds=frozenset((k, Fraction(n, self.num_calls)) for k, n in kinds.items()),
            runs=tuple(Fraction(n, self.num_calls) for n in runs),
            is_whole=all(runs),
        )

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
