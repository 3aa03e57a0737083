"""A message channel between rank 0 and one worker: frames of bytes, never pickles."""

import ctypes
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..backends.errors import SlipstreamError
from .messages import Message, from_bytes, to_bytes

_MAX_HEADER_BYTES = 1 << 28


class ChannelClosed(SlipstreamError, ConnectionError):  # noqa: N818
    """The process at the other end is gone."""


class Channel:
    """Messages with tensors over a connection. Tensors arrive on the CPU."""

    def __init__(self, connection: "Connection[Any, Any]"):
        self._connection = connection

    def send(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Raises ChannelClosed if nobody is there."""
        try:
            self._connection.send_bytes(to_bytes(message, tensors))
            for tensor in tensors:
                if tensor.numel():
                    whole = tensor.detach().cpu().contiguous()
                    self._connection.send_bytes(_memory(whole))
        except (OSError, ValueError) as error:
            raise ChannelClosed(str(error)) from error

    def recv(
        self, timeout_s: float | None = None, *, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Message, list[torch.Tensor]]:
        """The next message and its tensors; `meanwhile` is called about ten times a second.

        Raises TimeoutError, or ChannelClosed if the other end is gone.
        """
        try:
            self._wait(timeout_s, meanwhile)
            message, metas = from_bytes(self._connection.recv_bytes(_MAX_HEADER_BYTES))
            tensors = []
            for meta in metas:
                tensor = torch.empty(meta.shape, dtype=meta.dtype)
                if tensor.numel():
                    self._connection.recv_bytes_into(_memory(tensor))
                tensors.append(tensor)
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise ChannelClosed(str(error)) from error
        return message, tensors

    def _wait(self, timeout_s: float | None, meanwhile: Callable[[], None] | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            pause = left if meanwhile is None else min(0.1, 0.1 if left is None else left)
            if self._connection.poll(pause):
                return
            if meanwhile is not None:
                meanwhile()
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError

    @property
    def waitable(self) -> Any:
        """What multiprocessing.connection.wait takes."""
        return self._connection

    @property
    def has_news(self) -> bool:
        """Whether `recv` would not wait; also where the other end is gone."""
        try:
            return self._connection.poll(0)
        except (EOFError, OSError, ValueError):
            return True

    def close(self) -> None:
        self._connection.close()


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, valid as long as it lives."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
