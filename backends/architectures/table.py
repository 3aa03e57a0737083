"""All architectures, and the lookup by class."""

from dataclasses import replace

from . import (
    ace_step,
    aura_flow,
    cogvideox,
    cosmos,
    cosmos_predict2,
    ernie,
    flux,
    hidream,
    hidream_o1,
    hunyuan_video,
    ideogram4,
    joyimage,
    kandinsky5,
    krea2,
    lens,
    ltx,
    lumina,
    minimax,
    mochi,
    omnigen2,
    pixart,
    qwen_image,
    qwen_image21,
    sd3,
    unet,
    wan,
)
from .data import Architecture
from .plans import PLANS

FILES = (
    ace_step,
    aura_flow,
    cogvideox,
    cosmos,
    cosmos_predict2,
    ernie,
    flux,
    hidream,
    hidream_o1,
    hunyuan_video,
    ideogram4,
    joyimage,
    kandinsky5,
    krea2,
    lens,
    ltx,
    lumina,
    minimax,
    mochi,
    omnigen2,
    pixart,
    qwen_image,
    qwen_image21,
    sd3,
    unet,
    wan,
)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.class_name: replace(architecture, tokens=PLANS.get(architecture.class_name))
    for file in FILES
    for architecture in file.ARCHITECTURES
}

HOST = "comfy.ldm."


def find(network: object) -> Architecture | None:
    """The Architecture of a live network: of its class, else of the nearest base class.

    Only ComfyUI's own classes count: another pack's copy under the same name is unknown.
    """
    for cls in type(network).__mro__:
        architecture = ARCHITECTURES.get(cls.__name__)
        if architecture is None or not cls.__module__.startswith(HOST):
            continue
        if cls.__module__.endswith(architecture.module):
            return architecture
    return None
