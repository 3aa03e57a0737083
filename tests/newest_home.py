"""The newest torch, comfy-kitchen and comfy-aimdo under the ComfyUI that is here. Stdlib only.

They lie in one folder in front of the packages of ComfyUI's Python, which stays as it is.
"""

import os
import subprocess
from pathlib import Path

import comfy_home
import kept_packages

comfy_home.load_pack()
from slipstream.bench import setup_env  # noqa: E402

PACKAGES = ("torch", "torchvision", "comfy-kitchen", "comfy-aimdo")  # torchvision matches torch
_PROBE = (
    "import torch, torchvision, torchaudio, comfy_kitchen, comfy_aimdo.control\n"
    "assert torch.ops.torchvision.nms"
)
_VERSIONS = (
    "from importlib.metadata import version\n"
    f"print(', '.join(f'{{name}} {{version(name)}}' for name in {PACKAGES}))"
)


def make(python: str) -> tuple[Path, str]:
    """(folder for PYTHONPATH, versions in it); made, or renewed after a week.

    Raises SetupError with the reason if the packages cannot be installed or used together.
    """
    code = "import sys; print(sys.implementation.cache_tag)"
    tag = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    folder = setup_env.OWN / f"newest-{tag.strip()}"
    # torchaudio ends at 2.11, and its library refuses a torch of another CUDA. ComfyUI 0.33
    # imports it (0.38 does not); without the library it is Python, and enough for that.
    calls = (PACKAGES, ("--no-deps", "torchaudio"))
    kept_packages.renew(python, folder, calls, without=["torchaudio/lib/*torchaudio*"])
    problem = _ask(python, folder, _PROBE)[1]
    if problem:
        raise setup_env.SetupError(
            f"the newest packages do not work with ComfyUI's Python: {problem} "
            f"(delete {kept_packages.done_file(folder)} to install them again)"
        )
    return folder, _ask(python, folder, _VERSIONS)[0]


def _ask(python: str, folder: Path, code: str) -> tuple[str, str]:
    """(what `code` prints, the last line of its complaint or "")."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip(), complaint if done.returncode else ""
