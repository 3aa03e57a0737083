"""What `./run` does first: find or make a ComfyUI and a Python for it, then go on in that Python.

Stdlib only. Without a ComfyUI, and without a way to one, the standalone mode runs instead. Every
missing prerequisite ends in a sentence, never in a stack trace.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import install, setup_env
from .setup_env import OWN_VENV, PACK_ROOT, SetupError

COMFYUI, STANDALONE, MODELS = "comfyui", "standalone", "models"
INTERRUPTED = 130
_STANDALONE_NEEDS = "import torch, safetensors, PIL"


def parser() -> argparse.ArgumentParser:
    """The options of ./run."""
    options = argparse.ArgumentParser(
        prog="./run",
        description="Start a private ComfyUI with this pack, sample a tiny demo model, show what "
        "Slipstream did. Nothing outside this folder is changed.",
        epilog="COMFYUI_PATH and COMFYUI_PYTHON name a ComfyUI and its Python.",
    )
    options.add_argument("--comfyui", metavar="FOLDER", help="the ComfyUI checkout to use")
    options.add_argument("--serve", action="store_true", help="leave the server up afterwards")
    options.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options.add_argument("--steps", type=int, metavar="N", help="sampling steps (default 20)")
    options.add_argument("--port", type=int, metavar="N", help="port of the server on 127.0.0.1")
    options.add_argument("--keep", action="store_true", help="keep the server's folder and log")
    options.add_argument("--standalone", action="store_true", help="run without a ComfyUI")
    options.add_argument(
        "--doctor", action="store_true", help="say what sequence parallel finds on this machine"
    )
    options.add_argument(
        "--svdquant-cache",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="list the unpacked copies that SVDQuant Loader keeps (default: ComfyUI's folder)",
    )
    options.add_argument(
        "--svdquant-cache-delete", metavar="NAME", help="delete one of them, or all"
    )
    options.add_argument(
        "--install-from", metavar="URL", help="git URL or local clone from which to install ComfyUI"
    )
    # What the first Python tells the second: which part to run, and why it is not the full one.
    options.add_argument("--part", choices=(COMFYUI, STANDALONE, MODELS), help=argparse.SUPPRESS)
    options.add_argument("--reason", default="", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return options


def start(arguments: Sequence[str]) -> int:
    """Run `./run` with these arguments; the exit code."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        check(options)
        if options.part is None:
            return hand_over(options, list(arguments))
        return run_part(options)
    except KeyboardInterrupt:
        print("\nStopped.")
        return INTERRUPTED
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is installed or started."""
    if options.steps is not None and not 1 <= options.steps <= 10000:
        raise SetupError(f"--steps is {options.steps}: choose a number from 1 to 10000")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise SetupError(f"--port is {options.port}: choose a number from 1 to 65535")


def run_part(options: argparse.Namespace) -> int:
    """One of the three parts, in a Python that has what it needs; or the doctor there."""
    if options.doctor:
        from . import doctor

        return doctor.main([])
    if asks_for_copies(options):
        from . import svdquant_cache

        return svdquant_cache.run(options)
    if options.part == COMFYUI:
        from . import demo

        return demo.run(options)
    if options.part == STANDALONE:
        from . import standalone

        return standalone.run(options)
    from . import demo_models

    demo_models.write(Path(options.comfyui), options.folder)
    return 0


def asks_for_copies(options: argparse.Namespace) -> bool:
    """Whether SVDQuant Loader's copies are to be listed or deleted."""
    return options.svdquant_cache is not None or options.svdquant_cache_delete is not None


def hand_over(options: argparse.Namespace, arguments: list[str]) -> int:
    """Choose part and Python, then become that Python (on Windows: wait for it)."""
    part, python, found = choose(options)
    command = [python, str(PACK_ROOT / "run"), *arguments, "--part", part, *found]
    # Nothing is written into the ComfyUI checkout, bytecode neither.
    env = {**setup_env.clean_env(), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(python, command, env)
    return subprocess.run(command, env=env).returncode


def choose(options: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(part, Python, further arguments): the full one if it can be had."""
    if options.standalone:
        return STANDALONE, standalone_python(), ["--reason", "--standalone was given"]
    comfyui = setup_env.find_comfyui(options.comfyui)
    # these look, and install nothing but a Python
    if (options.doctor or asks_for_copies(options)) and comfyui is None:
        return STANDALONE, standalone_python(), ["--reason", "nothing is sampled"]
    named = setup_env.named_python()
    try:
        if comfyui is None:
            print("No ComfyUI found.", flush=True)
            comfyui = install.make_comfyui(cpu=options.cpu, source=options.install_from)
        print(f"ComfyUI: {comfyui}", flush=True)
        python = setup_env.find_python(comfyui) or install.make_python(comfyui)
    except SetupError as error:
        if named is not None and comfyui is not None:
            raise  # the user's own choice does not work: say so
        return STANDALONE, standalone_python(), ["--reason", str(error)]
    print(f"Python:  {python}", flush=True)
    return COMFYUI, python, ["--comfyui", str(comfyui)]


def standalone_python() -> str:
    """A Python with torch: COMFYUI_PYTHON, this one, ComfyUI's, one made before, or a new one."""
    named = setup_env.named_python()
    folders = (Path.home() / "comfy" / "venv", OWN_VENV, PACK_ROOT / ".venv")
    made = [str(path) for path in map(setup_env.venv_python, folders) if path.is_file()]
    for python in (*([named] if named else []), sys.executable, *made):
        if setup_env.cannot_run(python, _STANDALONE_NEEDS) is None:
            return python
    python = install.make_venv(OWN_VENV)
    print("Installing torch (some minutes)", flush=True)
    install.pip_install(python, ["torch", "safetensors", "pillow", "numpy"])
    return python


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
