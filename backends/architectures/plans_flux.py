"""Token plans of Flux, Flux.2, Chroma and HunyuanVideo, which share their blocks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .tokens import Blocks, Gather, GatherOut, Tok, TokenPlan, ranges

JOINT = ("txt", "img")
IMG, TXT, PE = Tok(1, ("img",)), Tok(1, ("txt",)), Tok(2, JOINT)
CONTROL = {"input": IMG, "output": IMG}

CHROMA = TokenPlan(
    blocks=(
        Blocks(
            path="double_blocks.*",
            layout=JOINT,
            args={"img": IMG, "txt": TXT, "pe": PE},
            define=("img", "txt"),
        ),
        Blocks(path="single_blocks.*", layout=JOINT, args={"pe": PE}),
    ),
    end=Gather(path="final_layer", args={"x": IMG}),
    control=CONTROL,
)


def _with_modulation_ranges(plan: TokenPlan) -> TokenPlan:
    """Blocks that take per-range modulation: lists of (start, stop, row) over their tokens."""
    double, single = plan.blocks
    return replace(
        plan,
        blocks=(
            replace(double, args={**double.args, "modulation_dims_img": ranges("img")}),
            replace(single, args={**single.args, "modulation_dims": ranges(*JOINT)}),
        ),
    )


_FLUX = _with_modulation_ranges(CHROMA)


# Text and references have other modulation under index_timestep_zero: text stays whole.
WHOLE_TEXT = replace(_FLUX, replicate=("txt",))
# HunyuanVideo cuts a reference latent off right behind the last block, by its whole length.
WITH_REFERENCE = replace(WHOLE_TEXT, end=GatherOut(path="single_blocks.*", tok=Tok(1, JOINT)))


def _flux_variant(arguments: Mapping[str, Any]) -> TokenPlan | None:
    is_zero = arguments.get("ref_latents_method") == "index_timestep_zero"
    return WHOLE_TEXT if is_zero else None


def _hunyuan_variant(arguments: Mapping[str, Any]) -> TokenPlan | None:
    return None if arguments.get("ref_latent") is None else WITH_REFERENCE


FLUX = replace(_FLUX, variant=_flux_variant)
HUNYUAN_VIDEO = replace(_FLUX, variant=_hunyuan_variant)

PLANS = {"Flux": FLUX, "Chroma": CHROMA, "HunyuanVideo": HUNYUAN_VIDEO}
