"""The real kernel packages that install from a wheel, for `./test kernels`. Stdlib only.

One folder per package, so that a test chooses which are installed: flash-attn-4 alone keeps
xFormers from being imported. They are used by whatever Python has torch; nothing of its own
environment changes.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import comfy_home

comfy_home.load_pack()
from slipstream.bench import install, setup_env  # noqa: E402

FOLDER = "SLIPSTREAM_KERNEL_PACKAGES"  # the environment variable that tells tests where they are
FRESH_S = 7 * 24 * 3600  # "newest" is asked for again after a week
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
            _install(python, root / name, calls)
    return root


def _install(python: str, folder: Path, calls: tuple[tuple[str, ...], ...]) -> None:
    done = folder.with_name(f"{folder.name}.done")
    if done.exists() and time.time() - done.stat().st_mtime < FRESH_S:
        return
    print(f"Installing {folder.name} into {folder.parent}", flush=True)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for arguments in calls:
            install.pip_install(python, arguments, target=new)
    except setup_env.SetupError as error:
        if not done.exists():
            raise
        print(f"{folder.name} stays as it is: {error}", file=sys.stderr)
        return
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    done.touch()
