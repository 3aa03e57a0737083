"""Starting worker processes: the only file that knows how they come to be.

A worker is `python start_worker.py HOST PORT NUMBER` by path, so that neither ComfyUI's main.py nor
any pack runs again. It gets a random key on stdin and connects back over loopback; stdin stays
open, and its end (however this process ends) ends the worker. Another launcher (c10d rendezvous
over hosts, Ray) has to give the same: Handles with a Channel.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from pathlib import Path
from typing import Any, Protocol

from ..backends.errors import SlipstreamError
from .channel import Channel
from .comm import NCCL_ENVIRONMENT
from .messages import PROTOCOL, Hello

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 120
_LOG_LINES = 20
_KEY_BYTES = 32
_FOLDER = "slipstream-workers-"
_TOLD = ("WARNING", "ERROR", "CRITICAL")
ABORT = "abort"  # a line on a worker's stdin, with an epoch
LOG_FORMAT = "%(levelname)s: %(message)s"  # of a worker


class StartFailed(SlipstreamError, RuntimeError):  # noqa: N818
    """A worker did not come up; with the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a new worker needs from the start: its device, and how many threads it may use."""

    device: str
    num_threads: int


class Handle(Protocol):
    """A running worker."""

    channel: Channel
    pid: int

    def exit_code(self) -> int | None:
        """None while it runs; negative numbers are signals."""

    def log_tail(self) -> str:
        """The end of what it printed."""

    def abort(self, epoch: int) -> None:
        """Free it from waiting in groups of `epoch`, whatever it does; it will answer."""

    def news(self) -> list[str]:
        """Warnings and errors that it has logged since the last time."""

    def kill(self) -> None:
        """End it at once, whatever it does, and give back what it held."""


class Launcher(Protocol):
    """Starts workers on some machines. `folder`: a private folder that all of them can read."""

    folder: Path

    def start(
        self, specs: Sequence[Spec], *, meanwhile: Callable[[], None] | None = None
    ) -> list[Handle]:
        """One Handle per spec, each having said Hello. Raises StartFailed, and leaves nothing."""

    def close(self) -> None:
        """Remove the folder."""


class LocalHandle:
    """A worker process on this machine."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, number: int):
        self._process, self._log = process, log
        self.pid, self.number = process.pid, number
        self.channel: Channel
        self._num_read_bytes = 0  # of the log

    def exit_code(self) -> int | None:
        return self._process.poll()

    def log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])

    def abort(self, epoch: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone
            os.write(self._process.stdin.fileno(), f"{ABORT} {epoch}\n".encode())

    def news(self) -> list[str]:
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._num_read_bytes)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._num_read_bytes += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [text for line in lines for kind, _, text in [line.partition(": ")] if kind in _TOLD]

    def kill(self) -> None:
        if hasattr(self, "channel"):
            self.channel.close()
        assert self._process.stdin is not None
        self._process.kill()  # works on a stopped process too
        self._process.stdin.close()
        self._process.wait()
        self._log.unlink(missing_ok=True)


class LocalLauncher:
    """Workers on this machine, by Popen. program: the worker script (tests have their own)."""

    def __init__(self, program: Path):
        self.program = program
        _remove_stale_folders()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))  # mode 0700
        self._started = 0

    def start(
        self, specs: Sequence[Spec], *, meanwhile: Callable[[], None] | None = None
    ) -> list[Handle]:
        handles: list[LocalHandle] = []
        reception = _Reception()
        try:
            for spec in specs:
                handles.append(self._spawn(spec, reception))
            reception.wait_for(handles, meanwhile)
        except BaseException:
            for handle in handles:
                handle.kill()
            raise
        finally:
            reception.close()
        return list(handles)

    def _spawn(self, spec: Spec, reception: "_Reception") -> LocalHandle:
        self._started += 1
        log = self.folder / f"worker-{self._started}.log"
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []
        host, port = reception.address
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *safe_path,
                    str(self.program),
                    host,
                    str(port),
                    str(self._started),
                ],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=worker_environment(os.environ, spec),
                cwd=self.folder,
            )
        assert process.stdin is not None
        process.stdin.write(reception.key.hex().encode() + b"\n")
        process.stdin.flush()
        return LocalHandle(process, log, self._started)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove_stale_folders() -> None:
    """Folders of processes that were killed before they could remove theirs."""
    if os.name == "nt":  # no way to ask whether a process exists without harming it
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        owner = folder.name.removeprefix(_FOLDER).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def worker_environment(inherited: Mapping[str, str], spec: Spec) -> dict[str, str]:
    """This process's environment, less what must not travel, plus what a worker needs.

    A worker has an allocator of its own: an inherited cudaMallocAsync has run out of memory
    (komikndr/raylight issue 99). It sees its own GPU only.
    """
    dropped = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTHONPATH")
    env = {name: value for name, value in inherited.items() if name not in dropped}
    kind, _, index = spec.device.partition(":")
    if kind == "cuda":
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            if name == "CUDA_VISIBLE_DEVICES" or inherited.get(name):
                env[name] = _visible(inherited.get(name, ""), int(index))
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        **env,
        **NCCL_ENVIRONMENT,
        "OMP_NUM_THREADS": str(spec.num_threads),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _visible(inherited: str, index: int) -> str:
    """Name of the GPU that this process calls cuda:<index>."""
    names = [name.strip() for name in inherited.split(",") if name.strip()]
    return names[index] if names else str(index)


class _Reception:
    """Accepts the workers' connections, in a thread, until closed."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(_KEY_BYTES)
        self._listener = Listener((_HOST, 0), backlog=64)
        self.address: tuple[str, int] = self._listener.address  # type: ignore[assignment]
        self._came: dict[int, Channel] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection: Connection[Any, Any] = self._listener.accept()
            except (OSError, EOFError):
                if self._closed:
                    return
                continue
            # In a thread of its own: a stranger who says nothing must not keep the others waiting.
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: "Connection[Any, Any]") -> None:
        """Admit a worker that has the key, as Listener.accept and Client know each other."""
        channel = Channel(connection)
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            message, _ = channel.recv(10)
        except (AuthenticationError, OSError, EOFError, TimeoutError, ValueError):
            channel.close()
            return
        if isinstance(message, Hello) and message.protocol == PROTOCOL and not self._closed:
            self._came[message.number] = channel
        else:
            channel.close()

    def wait_for(
        self, handles: Sequence[LocalHandle], meanwhile: Callable[[], None] | None
    ) -> None:
        """Give every handle its channel. Raises StartFailed."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        for handle in handles:
            while handle.number not in self._came:
                if meanwhile is not None:
                    meanwhile()
                code = handle.exit_code()
                if code is not None or time.monotonic() > deadline:
                    how = "did not start in time" if code is None else f"ended with code {code}"
                    raise StartFailed(f"A worker {how}. Last log lines:\n{handle.log_tail()}")
                time.sleep(0.02)
            handle.channel = self._came.pop(handle.number)

    def close(self) -> None:
        """Stop accepting; a dummy connection wakes the thread."""
        self._closed = True
        with contextlib.suppress(OSError, EOFError):
            Client(self.address).close()
        self._thread.join(5)
        self._listener.close()
        for channel in self._came.values():
            channel.close()
