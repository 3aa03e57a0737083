"""Ranks as forked processes, for tests of collectives and of shared calls. Unix only.

A rank runs on one thread and ends with os._exit; nothing outlives `run_ranks`.
"""

import io
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from slipstream.parallel.comm import Clock
from slipstream.parallel.mesh import Layout, Links


class RankFailed(AssertionError):  # noqa: N818
    """A rank raised, died or did not end in time; with its traceback."""


class Rank:
    """What the body of one rank gets: its number, and groups for a layout."""

    def __init__(self, number: int, folder: str):
        self.number, self.folder, self.clock = number, folder, Clock(torch.device("cpu"))
        self._kept: list[Links] = []  # a peer may still be connecting when the body is done

    def links(self, layout: Layout, name: str, *, timeout_s: float = 20) -> Links:
        """This rank's groups; every rank below layout.world must call with the same name."""
        store = dist.FileStore(str(Path(self.folder, name)), layout.world)
        links = Links(
            layout, self.number, store,
            name=name, backend="gloo", timeout_s=timeout_s, clock=self.clock,
        )  # fmt: skip
        self._kept.append(links)
        return links


def run_ranks(world: int, body: Callable[[Rank], Any], *, timeout_s: float = 60) -> list[Any]:
    """Every rank's return value. Raises RankFailed with the first cause found."""
    with tempfile.TemporaryDirectory(prefix="slipstream-ranks-") as folder:
        started = [_fork(body, Rank(number, folder)) for number in range(world)]
        try:
            return _collect(started, timeout_s)
        finally:
            for pid, reader in started:
                os.close(reader)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _fork(body: Callable[[Rank], Any], rank: Rank) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    buffer = io.BytesIO()
    try:
        torch.set_num_threads(1)
        torch.save(("ok", body(rank)), buffer)
    except BaseException:  # noqa: BLE001 - the parent reports it
        buffer = io.BytesIO()
        torch.save(("failed", traceback.format_exc()), buffer)
    with os.fdopen(writer, "wb") as out:
        out.write(buffer.getvalue())
    signal.pause()  # until everyone has answered: a closed group would fail the others
    os._exit(0)


def _collect(started: list[tuple[int, int]], timeout_s: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: list[str] = []
    buffers = {reader: b"" for _, reader in started}
    deadline = time.monotonic() + timeout_s
    while buffers and (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select(list(buffers), [], [], left)
        for reader in ready:
            data = os.read(reader, 1 << 20)
            buffers[reader] += data
            if data:
                continue
            raw = buffers.pop(reader)
            if not raw:
                failures.append("a rank died")
                continue
            kind, value = torch.load(io.BytesIO(raw), weights_only=False)
            if kind == "ok":
                answers[reader] = value
            else:
                failures.append(value)
                deadline = min(deadline, time.monotonic() + 2)
    if failures or buffers:
        causes = [f for f in failures if "TransportError" not in f.splitlines()[-1]] or failures
        raise RankFailed("\n".join(causes or [f"no answer in {timeout_s} s"]))
    return [answers[reader] for _, reader in started]
