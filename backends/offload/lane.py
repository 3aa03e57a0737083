"""A stream for copies beside the compute stream, ordered with it by marks.

Work inside `copying` goes to the copy stream. A mark taken on one stream and waited for on the
other orders them without stopping the host. Devices without streams run everything in order.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """A stream for copies beside the compute stream, ordered with it by marks."""

    stream: Any  # for ComfyUI's copy functions; None: the current one

    def copying(self) -> AbstractContextManager[Any]: ...

    def copied(self) -> Any: ...

    def wait_copied(self, mark: Any) -> None: ...

    def computed(self) -> Any: ...

    def wait_computed(self, mark: Any) -> None: ...

    def synchronize(self) -> None: ...


class StreamLane:
    """A second CUDA, HIP or XPU stream; marks are events."""

    def __init__(self, device: torch.device):
        self._api = torch.get_device_module(device)
        self._device = device
        self.stream = self._api.Stream(device)
        self.stream.as_context = self._api.stream  # ComfyUI 0.33 enters its streams by this

    def copying(self) -> AbstractContextManager[Any]:
        return self._api.stream(self.stream)

    def copied(self) -> Any:
        return self.stream.record_event()

    def wait_copied(self, mark: Any) -> None:
        self._api.current_stream(self._device).wait_event(mark)

    def computed(self) -> Any:
        return self._api.current_stream(self._device).record_event()

    def wait_computed(self, mark: Any) -> None:
        self.stream.wait_event(mark)

    def synchronize(self) -> None:
        self.stream.synchronize()


class InOrderLane:
    """A device without streams: every copy is done when the call returns."""

    stream = None

    def copying(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def copied(self) -> None: ...

    def wait_copied(self, mark: Any) -> None: ...

    def computed(self) -> None: ...

    def wait_computed(self, mark: Any) -> None: ...

    def synchronize(self) -> None: ...


def make_lane(device: torch.device) -> Lane:
    """The lane that this device can have."""
    return StreamLane(device) if device.type in ("cuda", "xpu") else InOrderLane()
