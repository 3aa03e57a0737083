"""What `python bench gpu` finds here: the GPU, the kernels, a ComfyUI that can be imported."""

import argparse
from typing import Any

import torch

from ..backends.attention.kernels.table import KERNELS
from . import children
from .children import last_line
from .environment import environment
from .in_process import lacking, use_comfyui
from .setup_env import SetupError

Json = dict[str, Any]


def main() -> int:
    """Answer what look() finds: a process of its own, so that none of it stays on the GPU."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    children.answer(look())
    return 0


def ask() -> Json:
    """What look() finds, in a process of its own; no_gpu also where that process fails."""
    found = children.ask("gpu_preflight")
    return {"no_gpu": found["error"]} if "error" in found else found


def look() -> Json:
    """environment, kernels that are not installed, why ComfyUI cannot be used; or no_gpu."""
    if not torch.cuda.is_available():
        return {"no_gpu": f"torch {torch.__version__} sees none"}
    found: Json = {"missing": {}}
    for kernel in KERNELS.values():
        reason = kernel.available()
        if reason is not None:
            found["missing"][kernel.id] = reason
    comfyui = None
    try:
        comfyui = use_comfyui(cpu=False)
        import comfy.sample
        import comfy.sd  # noqa: F401 - what the parts load and sample with
    except SetupError as error:
        found["comfyui_error"] = str(error)
    except ModuleNotFoundError as error:
        found["comfyui_error"] = lacking(str(error))
    except Exception as error:  # noqa: BLE001 - whatever ComfyUI's imports raise is the answer
        found["comfyui_error"] = f"{type(error).__name__}: {last_line(str(error))}"
    else:
        found |= _core_nodes()
    return {"environment": environment(comfyui=comfyui), **found}


def _core_nodes() -> Json:
    """core_nodes: why core's own sides cannot be measured; the others can."""
    try:
        import comfy_extras.nodes_easycache
        import comfy_extras.nodes_model_advanced  # noqa: F401
    except ModuleNotFoundError as error:
        return {"core_nodes": lacking(str(error))}
    return {}


def lines(here: Json) -> list[str]:
    """For a person, before the parts begin."""
    made = here["environment"]
    found = [f"{made['device']}, driver {made.get('driver')}, torch {made['torch']}"]
    comfyui = here.get("comfyui_error") or f"ComfyUI {made.get('comfyui')}"
    found.append(comfyui)
    if "core_nodes" in here:
        found.append(f"Without core's own nodes: {here['core_nodes']}")
    installed = [name for name in KERNELS if name not in here["missing"]]
    return [*found, f"Attention kernels: {', '.join(installed)}; not installed: "
                    f"{', '.join(here['missing']) or 'none'}"]  # fmt: skip
