"""Make what setup_env.py did not find: a venv, packages, a ComfyUI. Stdlib only.

Everything is made in .slipstream/ (and .venv/ for the tests), never in a user's environment.
Whatever cannot be made is a SetupError with the last thing that pip or comfy-cli said.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .setup_env import (
    OWN,
    OWN_COMFYUI,
    OWN_VENV,
    SetupError,
    cannot_run,
    clean_env,
    is_comfyui,
    venv_python,
)

# The newest of each need not match: torchaudio stopped at 2.11. These run ComfyUI 0.33.
_MATCHING_TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


def make_venv(folder: Path) -> str:
    """The Python of a virtual environment at `folder`, which is made if it is not there."""
    python = venv_python(folder)
    if not python.is_file() or cannot_run(str(python), "import sys"):
        print(f"Making a virtual environment in {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(folder), "--clear"]
        command, log = [sys.executable, "-m", "venv", *arguments], OWN / "venv.log"
        problem = _run(command, log)
        if problem:  # Debian's python3 without python3-venv: the pip of this Python fills it
            problem = _run([*command, "--without-pip"], log)
        if problem:
            raise SetupError(f"Cannot make a virtual environment in {folder}: {problem}")
    return str(python)


def pip_install(python: str, arguments: Sequence[str], *, target: Path | None = None) -> None:
    """`pip install` for `python`, into the folder `target` if given.

    Raises SetupError with pip's last error line, for example without a network.
    """
    pip = [python, "-m", "pip"]
    if not _has_pip(python):
        pip = [sys.executable, "-m", "pip", "--python", python]
    command = [*pip, "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--target", str(target), "--upgrade"] if target is not None else []
    problem = _run([*command, *arguments], OWN / "pip.log")
    if problem:
        raise SetupError(f"pip cannot install {' '.join(arguments)}: {problem}")


def make_comfyui(*, cpu: bool, source: str | None = None) -> Path:
    """A ComfyUI in .slipstream/, by comfy-cli; what it leaves undone there, make_python does.

    source: URL or local clone instead of comfy-cli's default. Raises SetupError if no checkout
    came of it, for example without a network.
    """
    python = make_venv(OWN_VENV)
    comfy = OWN_VENV / ("Scripts/comfy.exe" if os.name == "nt" else "bin/comfy")
    if not comfy.exists():
        pip_install(python, ["comfy-cli"])
    print(f"Asking comfy-cli for a ComfyUI in {OWN_COMFYUI} (some minutes)", flush=True)
    command = [str(comfy), "--skip-prompt", "--workspace", str(OWN_COMFYUI), "install"]
    command += ["--skip-manager", _device_flag(cpu), *(["--url", source] if source else [])]
    home = OWN / "home"  # comfy-cli remembers workspaces there: the user's own stay as they are
    home.mkdir(parents=True, exist_ok=True)
    # Without VIRTUAL_ENV comfy-cli would install into whatever environment is active.
    environment = {"HOME": str(home), "VIRTUAL_ENV": str(OWN_VENV), "DO_NOT_TRACK": "1"}
    environment.update(_configs())
    problem = _run(command, OWN / "comfy-cli.log", environment)
    if not is_comfyui(OWN_COMFYUI):
        raise SetupError(
            f"comfy-cli could not install ComfyUI: {problem or 'no checkout was made'}"
        )
    return OWN_COMFYUI


def make_python(comfyui: Path) -> str:
    """A venv of our own that can run this ComfyUI. Raises SetupError if pip cannot fill it."""
    python = make_venv(OWN_VENV)
    if cannot_run(python):
        print("Installing torch and ComfyUI's requirements (some minutes)", flush=True)
        try:
            pip_install(python, _MATCHING_TORCH)
        except SetupError:  # not for this Python or platform: what pip thinks best
            pip_install(python, [name.partition("==")[0] for name in _MATCHING_TORCH])
        pip_install(python, ["-r", str(comfyui / "requirements.txt")])
        problem = cannot_run(python)
        if problem:
            raise SetupError(f"The environment in {OWN_VENV} cannot run ComfyUI: {problem}")
    return python


def _device_flag(cpu: bool) -> str:
    if sys.platform == "darwin":
        return "--m-series"
    if cpu or not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):
        return "--cpu"
    return "--nvidia" if shutil.which("nvidia-smi") else "--amd"


def _configs() -> dict[str, str]:
    """pip's and git's settings of the user, for a program that gets another HOME."""
    home = Path.home()
    found = {}
    for variable, places in (
        ("PIP_CONFIG_FILE", (".config/pip/pip.conf", ".pip/pip.conf")),
        ("GIT_CONFIG_GLOBAL", (".gitconfig", ".config/git/config")),
    ):
        files = [home / place for place in places if (home / place).is_file()]
        if files and variable not in os.environ:
            found[variable] = str(files[0])
    return found


def _has_pip(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", "import pip"], capture_output=True, env=clean_env(), timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run to the end with the output in `log`; "" or, if it failed, the line that says why."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**clean_env(), **(environment or {})}
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C: end what it started too
            if os.name == "nt":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code == 0:
        return ""
    lines = [line.strip(" │╭╰─╮╯") for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    said = (errors or lines or [f"exit code {code}"])[-1]
    return f"{said} (all of it: {log})"
