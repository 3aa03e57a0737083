"""The real kernel packages that install from a wheel, for `./test kernels`. Stdlib only.

One folder per package, so that a test chooses which are installed: flash-attn-4 alone keeps
xFormers from being imported. They are used by whatever Python has torch; nothing of its own
environment changes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy_home
import kept_packages

comfy_home.load_pack()
from slipstream.bench import setup_env  # noqa: E402

FOLDER = "SLIPSTREAM_KERNEL_PACKAGES"  # the environment variable that tells tests where they are
# folder -> pip's arguments, one call each. --no-deps leaves torch to the Python that has it.
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "numpy": (("numpy<2.3",),),  # Triton's interpreter
    "triton": (("--no-deps", "triton"),),  # where torch brings none: CPU builds
    "sageattention": (("--no-deps", "sageattention==1.0.6"),),
    "kitchen": (("--no-deps", "comfy-kitchen"),),
    "kitchen-0.2.31": (("--no-deps", "comfy-kitchen==0.2.31"),),
    "flash4": (
        ("nvidia-cutlass-dsl", "apache-tvm-ffi<0.2"),
        ("--no-deps", "--pre", "flash-attn-4", "quack-kernels", "torch-c-dlpack-ext", "einops"),
    ),
    "xformers": (("--no-deps", "xformers"),),
}


def make(python: str) -> Path:
    """The folder with the packages for `python`, which are installed if need be.

    Raises SetupError with pip's reason if one cannot be had and none is there from before.
    """
    code = "import sys, torch; print(sys.implementation.cache_tag, torch.__version__)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    root = setup_env.OWN / f"kernels-{'-'.join(said.split()[-2:])}"
    has_triton = setup_env.cannot_run(python, "import triton") is None
    for name, calls in PACKAGES.items():
        if name != "triton" or not has_triton:
            kept_packages.renew(python, root / name, calls)
    return root


def ask(
    question: str, packages: Sequence[str] = (), *, interpret: bool = False, **more: Any
) -> Any:
    """The answer of kernels_child.py to a question, in a process where `packages` are installed.

    interpret: Triton's kernels run in its interpreter, so under `python -O`. Raises AssertionError
    with the end of what the process said.
    """
    names, env = list(packages), {**os.environ, "OMP_NUM_THREADS": "1"}
    if names and (Path(os.environ[FOLDER]) / "triton").exists():
        names.append("triton")
    if interpret:
        env["TRITON_INTERPRET"] = "1"
        names.insert(0, "numpy")
    content = json.dumps({"ask": question, "packages": names, **more})
    child = str(Path(__file__).with_name("kernels_child.py"))
    command = [sys.executable, *(["-O"] if interpret else []), child, content]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])
