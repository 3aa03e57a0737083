"""What a measurement ran on, as JSON: versions, processor, device, and how busy the machine was."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .setup_env import PACK_ROOT

_PACKAGES = ("comfy-kitchen", "cache-dit", "sageattention", "flash-attn", "xformers", "triton")


def environment(*, comfyui: Path | None = None, cpu: bool = False) -> dict[str, Any]:
    """Recorded beside every result. Names no host, user or folder.

    cpu: nothing was computed on a GPU, even if there is one; ComfyUI on the CPU says so by itself.
    """
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": num_cores(),
        "cpu": cpu_name(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "packages": {name: at for name in _PACKAGES if (at := installed(name))},
        "device": "cpu",
    }
    if comfyui is not None:
        found["comfyui"] = comfyui_version(comfyui)
    if torch.cuda.is_available() and not cpu and not _comfyui_on_cpu():
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return found


def _comfyui_on_cpu() -> bool:
    """Whether the ComfyUI of this process, if it has one, was told to stay off the GPU."""
    cli = sys.modules.get("comfy.cli_args")
    return cli is not None and bool(cli.args.cpu)


_SAME = ("commit", "torch", "device", "driver", "packages", "comfyui")


def same_machine(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results may stand in one table: same GPU, versions, commit and rehearsal."""
    one, other = before.get("environment", {}), now["environment"]
    rehearsed = bool(before.get("rehearsal")) == bool(now.get("rehearsal"))
    return rehearsed and all(one.get(name) == other.get(name) for name in _SAME)


def num_cores() -> int | None:
    """Cores that this process may use (taskset and containers allow fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The pack's commit, with a + if tracked files have changed; None outside a checkout."""
    try:
        head = _output("git", "-C", str(PACK_ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(PACK_ROOT), "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def comfyui_version(root: Path) -> str:
    """Of a checkout."""
    return (root / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]


def cpu_name() -> str:
    """The processor, and the instruction sets that decide how fast it multiplies."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").splitlines()
    values = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = values.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{values.get('model name', platform.processor())} ({', '.join(wide)})"


def driver() -> str | None:
    """Of the NVIDIA GPU."""
    try:
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        return _output("nvidia-smi", *query).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()
