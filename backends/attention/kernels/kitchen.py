"""What the kernels of comfy-kitchen share: its functions, and whether they run on a GPU here.

comfy-kitchen is a requirement of ComfyUI, which pins the version it was tested with: users get a
newer one with a newer ComfyUI. Source: comfy_kitchen/__init__.py, 0.2.31 to 0.2.40.
"""

from collections.abc import Callable
from typing import Any

import torch

from .package import UnavailableError, version_of

PACKAGE, TITLE = "comfy_kitchen", "comfy-kitchen"
PIP = "It comes with ComfyUI: update ComfyUI and run pip install -r requirements.txt there"
DISTRIBUTIONS = ("comfy-kitchen",)


def function(package: Any, name: str, what: str) -> Callable[..., Any]:
    """comfy_kitchen.`name`, if this version has it and the question where it runs.

    Raises UnavailableError.
    """
    found = getattr(package, name, None)
    if found is None or not hasattr(package, f"{name}_is_available"):
        raise UnavailableError(f"comfy-kitchen {version_of(TITLE)} has no {what}. {PIP}")
    attention: Callable[..., Any] = found
    return attention


def require_device(supported: Callable[[torch.device], bool], what: str, needs: str) -> None:
    """Raise UnavailableError if no GPU here can run it; without a GPU, the request says so.

    supported: the package's own question. From 0.2.36 on it takes a torch.device, before also a
    number.
    """
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.cuda.is_available() and not any(map(supported, devices)):
        raise UnavailableError(
            f"comfy-kitchen's {what} does not run here: it needs {needs}, "
            f"and a build of comfy-kitchen whose compiled extension loads. {PIP}"
        )
