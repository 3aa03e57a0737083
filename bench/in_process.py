"""ComfyUI in this process, for the measurements that need its loaders and its sampler.

use_comfyui() comes before anything that imports comfy: device and attention function are picked
at that import. The checkout is only read.
"""

import re
import sys
from pathlib import Path

from .setup_env import SetupError, find_comfyui

# What ComfyUI's own folders and files are called, as far as loaders and samplers import them.
OF_COMFYUI = (
    "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras",
    "app", "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "protocol",
    "server", "utils",
)  # fmt: skip
_NAMED = re.compile(r"No module named '([\w.]+)'")

NOT_FOUND = (
    "ComfyUI not found: set COMFYUI_PATH to a ComfyUI checkout (0.33 or newer) "
    "or install one with comfy-cli, whose default place is ~/comfy/ComfyUI"
)


def use_comfyui(*, cpu: bool = True) -> Path:
    """Make `import comfy` work; its root. Raises SetupError without a ComfyUI."""
    root = find_comfyui()
    if root is None:
        raise SetupError(NOT_FOUND)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from comfy.cli_args import args

    if cpu:
        args.cpu = True
        args.use_pytorch_cross_attention = True  # the CPU's default is sub-quadratic, not SDPA
    return root


def lacking(message: str) -> str:
    """What to do about "No module named ..."."""
    named = _NAMED.search(message)
    if named is None:
        return message
    top = named[1].split(".")[0]
    if top in OF_COMFYUI:
        return f"the ComfyUI here has no {named[1].replace('.', '/')}: bring all of its Python"
    return f"the package {top} is not installed, and ComfyUI imports it: bring it"
