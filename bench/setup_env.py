"""Where ComfyUI is and which Python runs it. Stdlib only; looks, makes nothing (see install.py).

A prerequisite that is named and cannot be used is a SetupError whose message is the sentence that
users see; one that is merely absent is None.
"""

import os
import subprocess
import sys
from pathlib import Path

PACK_ROOT = Path(os.path.abspath(__file__)).parents[1]  # not resolved: custom_nodes may link here
OWN = PACK_ROOT / ".slipstream"  # everything that ./run and ./test make; git ignores it
OWN_VENV = OWN / "venv"
OWN_COMFYUI = OWN / "ComfyUI"
# What a ComfyUI server imports at start; torchvision fails if its build does not match torch.
_PROBE = (
    "import torch, torchvision, torchaudio, aiohttp, safetensors, yaml, einops, transformers\n"
    "import comfyui_frontend_package, comfy_kitchen"
)


class SetupError(RuntimeError):
    """A prerequisite is missing; the message says what to do."""


def is_comfyui(root: Path) -> bool:
    """Whether `root` is the root of a ComfyUI checkout."""
    return (root / "comfy" / "model_patcher.py").is_file() and (root / "main.py").is_file()


def find_comfyui(named: str | None = None) -> Path | None:
    """--comfyui, COMFYUI_PATH, the ComfyUI around this pack, ~/comfy/ComfyUI, one made by ./run.

    Raises SetupError if one was named and is not a ComfyUI; None if none was found.
    """
    sources = (("--comfyui ", named), ("COMFYUI_PATH=", os.environ.get("COMFYUI_PATH")))
    for source, path in sources:
        if path:
            root = Path(path).expanduser().absolute()
            if not is_comfyui(root):
                raise SetupError(
                    f"{source}{path} has no comfy/model_patcher.py: "
                    "point it at the root of a ComfyUI checkout"
                )
            return root
    around = PACK_ROOT.parents[1] if PACK_ROOT.parent.name == "custom_nodes" else None
    places = (around, Path.home() / "comfy" / "ComfyUI", OWN_COMFYUI)
    return next((place for place in places if place is not None and is_comfyui(place)), None)


def find_python(comfyui: Path) -> str | None:
    """A Python that can run this ComfyUI: COMFYUI_PYTHON, a venv of its, ours, the current one.

    Raises SetupError if COMFYUI_PYTHON is set and cannot.
    """
    named = named_python()
    if named is not None:
        problem = cannot_run(named)
        if problem:
            raise SetupError(f"COMFYUI_PYTHON={named} cannot run ComfyUI: {problem}")
        return named
    folders = (comfyui / ".venv", comfyui / "venv", comfyui.parent / "venv", OWN_VENV)
    candidates = [venv_python(folder) for folder in folders]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")  # the Windows portable
    found = [str(path) for path in candidates if path.is_file()]
    return next((python for python in (*found, sys.executable) if not cannot_run(python)), None)


def named_python() -> str | None:
    """COMFYUI_PYTHON, or None if it is not set. Raises SetupError if it is no program."""
    named = os.environ.get("COMFYUI_PYTHON")
    if not named:
        return None
    path = Path(named).expanduser().absolute()
    if not path.is_file():
        raise SetupError(
            f"COMFYUI_PYTHON={named} does not exist: name ComfyUI's Python, or unset it"
        )
    return str(path)


def venv_python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def cannot_run(python: str, probe: str | None = None) -> str | None:
    """Why `python` fails to run `probe` (by default what ComfyUI imports at start), or None."""
    try:
        done = subprocess.run(
            [python, "-c", probe or _PROBE],
            capture_output=True,
            text=True,
            timeout=300,
            env=clean_env(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    if "torchvision::nms does not exist" in done.stderr:
        return _mismatch(python)
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ends with exit code {done.returncode}"


def clean_env() -> dict[str, str]:
    """The environment without PYTHONPATH and PYTHONHOME, which belong to another Python."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def _mismatch(python: str) -> str:
    code = "from importlib.metadata import version as v; print(v('torch'), v('torchvision'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean_env())
    torch, torchvision = (*done.stdout.split(), "?", "?")[:2]
    return (
        f"torch {torch} and torchvision {torchvision} do not match "
        "(operator torchvision::nms does not exist): install both from the same place"
    )
