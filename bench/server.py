"""A private, headless ComfyUI server in a throw-away base directory. Stdlib only.

    with Server(comfyui, packs={"slipstream": PACK_ROOT}) as server:
        print(server.address)

The checkout is only read: models, custom nodes, outputs and the database are the base directory's
or memory's. The server listens on 127.0.0.1 and ends with this process, however that ends.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LOG_TAIL = 3000
_STOP_TIMEOUT_S = 10


class ServerError(RuntimeError):
    """The server did not start; the message ends with the end of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_port_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        if os.name != "nt":  # as asyncio does: a port in TIME_WAIT counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Server:
    """ComfyUI with the given packs; `with` starts it, waits until it answers, and stops it.

    packs: folder name in custom_nodes -> pack; models: linked as the models folder; base: kept
    afterwards if given, else a temporary folder; cpu: no GPU is touched; environment: added to
    this process's own, without PYTHONPATH unless it is given here.
    """

    def __init__(
        self,
        comfyui: Path,
        *,
        packs: Mapping[str, Path],
        models: Path | None = None,
        python: str = sys.executable,
        port: int | None = None,
        base: Path | None = None,
        cpu: bool = True,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 120,
    ):
        self.comfyui, self.packs, self.models = comfyui, dict(packs), models
        self.python, self.cpu, self.arguments = python, cpu, list(arguments)
        self.environment = dict(environment or {})
        self.ready_timeout_s = ready_timeout_s
        self.port = port if port is not None else free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.ready_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self._temporary = None if base else tempfile.TemporaryDirectory(prefix="slipstream-server-")
        self.base = base if base else Path(self._temporary.name)  # type: ignore[union-attr]
        self.log_path = self.base / "server.log"

    def command(self) -> list[str]:
        """The command line, with `arguments` last."""
        cpu = ["--cpu", "--use-pytorch-cross-attention"] if self.cpu else []
        return [
            self.python,
            str(self.comfyui / "main.py"),
            *cpu,
            "--listen=127.0.0.1",
            f"--port={self.port}",
            "--disable-api-nodes",
            "--disable-auto-launch",
            f"--base-directory={self.base}",
            "--database-url=sqlite:///:memory:",
            *self.arguments,
        ]

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Lay out the base directory and start the process without waiting for it."""
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, pack in self.packs.items():
            link_folder(self.base / "custom_nodes" / name, pack)
        if self.models is not None:
            link_folder(self.base / "models", self.models)
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if self.cpu:  # one thread per core stalls as soon as anything else runs
            inherited.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // 2, 1)))
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.base,
                env={**inherited, **quiet, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us, and we stop the server
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return self.process

    def __enter__(self) -> "Server":
        try:
            process, started = self.spawn(), time.monotonic()
            while not self.answers():
                if process.poll() is not None:
                    raise ServerError(
                        f"ComfyUI exited with {process.returncode} at start:\n{self.log_tail()}"
                    )
                if time.monotonic() - started > self.ready_timeout_s:
                    raise ServerError(
                        f"ComfyUI not ready after {self.ready_timeout_s:.0f} s:\n{self.log_tail()}"
                    )
                time.sleep(0.2)
            self.ready_s = time.monotonic() - started
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and what it started, then remove a temporary base directory."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):  # the rest of its group, or itself
                self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait()
            self.process = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        if os.name == "nt":
            self.process.terminate()
        else:
            os.killpg(self.process.pid, number)

    def answers(self) -> bool:
        """Whether the HTTP API is up."""
        try:
            self.get("/system_stats")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, body: Any) -> bytes:
        """Body of the reply to a POST of JSON. Raises urllib.error.HTTPError from status 400."""
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self) -> str:
        return self.log()[-_LOG_TAIL:]


def link_folder(link: Path, target: Path) -> None:
    """Make `link` a link to the folder `target`: a symlink, on Windows a junction or a copy."""
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(target.resolve(), target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        shutil.copytree(target, link, ignore=shutil.ignore_patterns(".git", ".venv", ".slipstream"))


def _end_with_parent() -> None:
    """PR_SET_PDEATHSIG: the kernel ends the server if this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
