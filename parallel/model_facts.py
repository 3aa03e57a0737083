"""What decides whether a MODEL can be shared, as far as it can be known without ComfyUI."""

import os
import shutil
import subprocess
from typing import Any

import torch

from ..backends.architectures.plans import find_plan
from ..backends.architectures.tokens import TokenPlan
from ..backends.cache.config import BLOCK_STRATEGIES
from ..backends.run import Run, attached
from .bind import bind
from .runs import NAME, config_fields
from .shards import PlanError


def checked_plan(network: torch.nn.Module) -> tuple[TokenPlan | None, str]:
    """The network's plan, checked against it; else None and the sentence that says why."""
    plan = find_plan(network)
    if not isinstance(plan, TokenPlan):
        return None, plan
    try:
        bind(plan, network)
    except PlanError as error:
        return None, (
            f"{error}. Only images of a batch and prompts are shared until the pack is updated."
        )
    return plan, ""


def travelling(run: Run) -> dict[str, dict[str, Any]] | str:
    """Techniques that work inside a call, with their settings, or why they cannot travel."""
    found = {}
    for name, attached_technique in attached(run.patcher).items():
        technique: Any = attached_technique
        if name in run.disabled or name == NAME:
            continue
        if name == "svdquant":  # comes with the file: the loader attaches it on the worker too
            continue
        if name in ("attention", "offload"):  # every rank gets the same budget for its weights
            found[name] = config_fields(technique.config)
        elif name == "cache":
            strategy = technique.config.strategy
            if strategy == "pab":
                return "cache strategy pab keeps attention outputs that ranks exchange"
            if strategy in BLOCK_STRATEGIES or strategy == "auto":
                found[name] = config_fields(technique.config)
        else:
            return f"{name} does not travel to workers yet: leave it out, or set workers to 1"
    return found


def num_heads(network: torch.nn.Module, plan: TokenPlan) -> int | None:
    found: Any = network
    for part in plan.heads.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
        if found is None:
            return None
    return found if isinstance(found, int) else None


def plain_device(device: torch.device) -> torch.device:
    """cuda as cuda:0, cpu:0 as cpu."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device(device.type, device.index or 0)


def gpus(own: torch.device) -> tuple[list[str], list[str]]:
    """The GPUs that this process sees beside and with `own`: all, and those of its kind.

    Where nobody names them only those of one kind share: mixed ones wait for the slowest.
    """
    if own.type != "cuda":
        return [], []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = [f"cuda:{i}" for i in range(len(names))]
    return found, [f"cuda:{i}" for i, name in enumerate(names) if name == names[own.index]]


def why_one_device(own: torch.device) -> str:
    """The sentence for a computer where nothing was found to share with, and what to do."""
    head = "Sequence parallel found one device: it runs there as without the node"
    if own.type not in ("cpu", "cuda"):
        return f"{head}. Only NVIDIA and AMD GPUs (CUDA, ROCm) are shared, not {own.type}"
    if own.type == "cpu":
        return head
    visible = torch.cuda.device_count()
    hidden = num_installed_gpus() - visible
    if hidden <= 0:
        others = [torch.cuda.get_device_name(i) for i in range(visible) if i != own.index]
        kinds = ", ".join(f"cuda:{i}" for i in range(visible))
        return head if not others else f"{head}. To use unlike GPUs name them: devices {kinds}"
    if is_windows():
        return (
            f"{head}. ComfyUI hides the other {hidden} GPUs on Windows: start it with "
            "--cuda-device all --disable-pinned-memory"
        )
    return (
        f"{head}. {hidden} more GPUs are hidden from ComfyUI (--cuda-device or "
        "CUDA_VISIBLE_DEVICES): start it without, or with all that it may use"
    )


def is_windows() -> bool:
    return os.name == "nt"


def num_installed_gpus() -> int:
    """NVIDIA GPUs in this computer, hidden ones too; 0 where that cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
