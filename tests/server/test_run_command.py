"""`./run` as a newcomer types it: the whole way, Ctrl-C at any point, and what can be missing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import comfy_home
import pytest
from isolated_server import free_port

ROOT = comfy_home.PACK_ROOT
pytestmark = pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps and POSIX signals")


class Run:
    """A running ./run whose output is read while it comes."""

    def __init__(self, folder: Path, *arguments: str, **environment: str):
        self.log = folder / "run.log"
        self.file = self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run"), *arguments],
            cwd=folder,  # from anywhere
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder), **environment},
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        started = time.monotonic()
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() - started < timeout_s, self.output()
            time.sleep(0.1)

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal, as a terminal sends Ctrl-C; the exit code."""
        os.killpg(self.process.pid, number)
        return self.process.wait(60)


@pytest.fixture
def run(comfy, tmp_path):
    started = []

    def start(*arguments: str, **environment: str) -> Run:
        started.append(Run(tmp_path, *arguments, "--cpu", **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGTERM)
        one.file.close()


def servers(port: int) -> list[str]:
    """Pids of the processes that were told to listen on `port`."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if "main.py" in line and f"--port={port} " in line]


def gone(port: int, timeout_s: float = 20) -> bool:
    started = time.monotonic()
    while servers(port) and time.monotonic() - started < timeout_s:
        time.sleep(0.1)
    return not servers(port)


def test_serve_samples_reports_and_stays_until_interrupted(run):
    port = free_port()
    one = run("--serve", "--steps", "3", "--port", str(port))
    one.wait_for("Ctrl-C stops it")
    text = one.output()
    assert "3 of 3 steps" in text
    assert "Attention (balanced): " in text
    assert "Traceback" not in text
    assert f"http://127.0.0.1:{port}" in text
    picture = ROOT / "output" / "slipstream-report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads((ROOT / "output" / "slipstream-report.json").read_text())
    assert report["schema"] == 1
    assert report["run"]["steps"] == 3
    listed = f"http://127.0.0.1:{port}/workflow_templates"
    with urllib.request.urlopen(listed, timeout=10) as reply:
        assert "ComfyUI-Slipstream" in json.load(reply)
    assert len(servers(port)) == 1
    assert one.end() == 0
    assert not servers(port)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["Ctrl-C", "terminated", "killed"],
)
def test_end_while_starting_leaves_nothing(run, number, code):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("the kernel ends the server on Linux only")
    port = free_port()
    one = run("--port", str(port))
    one.wait_for("Starting ComfyUI")
    while not servers(port):
        assert one.process.poll() is None, one.output()
        time.sleep(0.05)
    assert one.end(number) == code
    assert gone(port)
    assert "Traceback" not in one.output()


def test_busy_port_is_a_sentence(run):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        one = run("--port", str(port))
        assert one.process.wait(60) == 1
    assert f"Port {port} is in use: choose another with --port" in one.output()
    assert "Traceback" not in one.output()
