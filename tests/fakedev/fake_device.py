"""The fake accelerator: a PrivateUse1 torch device backed by RAM that counts its bytes.

`build()` compiles it once into a cache folder (about 25 s with g++ and ninja), `register()` makes
`torch.device("fakegpu")` work in this process. It has no streams, so it shows what is copied and
held, not what overlaps.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch

NAME = "fakegpu"
SOURCE = Path(__file__).with_name("fake_device.cpp")
STALE_LOCK_S = 300.0


def missing_tool() -> str | None:
    """Why the device cannot be built here, or None."""
    _add_scripts_to_path()
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None:
            return f"fake accelerator skipped: {tool} not found (apt install g++ ninja-build)"
    return None


def folder() -> Path:
    """Where the compiled device is kept: one folder per source, torch and Python version."""
    key = SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()
    root = os.environ.get("SLIPSTREAM_TEST_CACHE", tempfile.gettempdir())
    return Path(root) / f"slipstream-fakedev-{hashlib.sha256(key).hexdigest()[:12]}"


def build() -> Any:
    """The compiled module: held(), peak(), reset_peak(), copied_in(), reset_copied_in()."""
    from torch.utils.cpp_extension import load

    _add_scripts_to_path()
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    # torch waits for ever on the lock of a build that was killed
    lock = target / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_LOCK_S:
        lock.unlink()
    os.environ.setdefault("MAX_JOBS", "2")
    return load(
        name="slipstream_fakedev",
        sources=[str(SOURCE)],
        extra_cflags=["-O1", "-g0"],
        build_directory=str(target),
    )


def register(total_bytes: int = 10**12) -> Any:
    """Make the device known to torch under NAME, with memory counters like torch.cuda's.

    Returns the compiled module; `module.total_bytes` may be set later. `module.unbacked` says how
    many held bytes are address ranges without memory; `module.free()` is what is left.
    """
    device = build()
    device.total_bytes = total_bytes
    device.unbacked = lambda: 0
    device.free = lambda: device.total_bytes - device.held() + device.unbacked()
    torch.utils.rename_privateuse1_backend(NAME)
    api: Any = types.ModuleType(NAME)
    api.is_available = api.is_initialized = lambda: True
    api._is_in_bad_fork = lambda: False
    api.device_count = lambda: 1
    api.current_device = lambda: 0
    api.synchronize = lambda device=None: None
    api.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    api.mem_get_info = lambda index=None: (device.free(), device.total_bytes)
    api.memory_allocated = lambda index=None: device.held()
    api.max_memory_allocated = lambda index=None: device.peak()
    api.reset_peak_memory_stats = lambda index=None: device.reset_peak()
    api.memory_reserved, api.max_memory_reserved = api.memory_allocated, api.max_memory_allocated
    torch._register_device_module(NAME, api)
    return device


def _add_scripts_to_path() -> None:
    """pip's ninja lies beside the interpreter, which is not always on PATH."""
    scripts = str(Path(sys.executable).parent)
    parts = os.environ.get("PATH", "").split(os.pathsep)
    if scripts not in parts:
        os.environ["PATH"] = os.pathsep.join([*parts, scripts])


if __name__ == "__main__":
    build()
