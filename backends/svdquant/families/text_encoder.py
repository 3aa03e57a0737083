"""Text encoders with 4-bit layers: names are ComfyUI's own, which class it is ComfyUI detects."""

from typing import Any

from .data import Family, Shapes


def _no_config(shapes: Shapes) -> dict[str, Any]:
    raise AssertionError("text encoders are not converted")


TEXT_ENCODER = Family(
    id="text-encoder",
    title="text encoder",
    model_class="",
    dialect="comfy-kitchen",
    markers=(),
    native=(),
    blocks=(),
    rest=(),
    diffusers_config=_no_config,
    keeps_dtype=True,  # ComfyUI picks the dtype of the rest from it
)
