"""All token plans, by the exact class of the network.

Subclasses are not looked up by their base: they override the forward that a plan describes.
"""

from . import plans_flux, plans_image, plans_video, plans_wan
from .tokens import TokenPlan

PLANS: dict[str, TokenPlan] = {
    **plans_wan.PLANS,
    **plans_flux.PLANS,
    **plans_video.PLANS,
    **plans_image.PLANS,
}

# Classes that a plan cannot serve, with the reason; any other class without a plan is unknown.
REFUSED = {
    "ACEStepTransformer2DModel": "its self attention is linear, without ComfyUI's hook",
    "AceStepConditionGenerationModel": "its attention does not pass transformer_options",
    "ErnieImageModel": "its attention does not pass transformer_options",
    "GeneralDIT": "it adds positions to the whole sequence between its blocks",
    "QwenImage21Transformer2DModel": "it attends part by part, by positions in the whole sequence",
}


def find_plan(network: object) -> TokenPlan | str:
    """The plan for a network, or the sentence that says why there is none."""
    name = type(network).__name__
    if name in PLANS and type(network).__module__.startswith("comfy.ldm."):
        return PLANS[name]
    why = f" ({REFUSED[name]})" if name in REFUSED else ""
    return (
        f"No token plan for class {name}{why}: only images of a batch and prompts are shared "
        "(docs/adding-an-architecture.md)."
    )
