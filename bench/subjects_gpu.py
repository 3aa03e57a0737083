"""Subjects of full width for a CUDA device: Flux, Wan, Qwen-Image and SDXL with random weights.

What a technique gains or loses at the sizes that people use; pictures are noise. The networks are
those of offload_models.py in bf16: Flux and SDXL whole, some of the blocks of Wan 14B and
Qwen-Image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import offload_models
from .subjects import Subject
from .trained import Sampled, sample_timed

NUM_STEPS = 12


@dataclass(frozen=True)
class FullWidth:
    """model: as offload_models.make() knows it; size: of its sizes; family: see Subject."""

    title: str
    model: str
    size: str
    cfg: float
    family: str


FULL_WIDTH = (
    FullWidth("full-width Flux, 1024 x 1024", "flux", "1024", 1.0, "flux"),
    FullWidth("full-width Wan, 480p, 81 frames", "wan-video", "480p 81 frames", 1.0, "wan"),
    FullWidth("full-width Wan, 480p, 17 frames", "wan", "480p 17 frames", 5.0, "wan"),
    FullWidth("full-width Qwen-Image, 1024 x 1024", "qwen", "1024", 4.0, "qwen_image"),
    FullWidth("full-width SDXL, 1024 x 1024", "sdxl", "1024", 7.0, "sdxl"),
)


def gpu_subjects() -> list[Callable[[], Subject]]:
    """What makes each of them; one is made when its turn comes and needs up to 40 GB of RAM."""
    return [partial(full_width, one) for one in FULL_WIDTH]


def full_width(one: FullWidth, *, rehearse: bool = False) -> Subject:
    """One of them, loaded by ComfyUI's loader. rehearse: narrow and small, under its name."""
    case = offload_models.make(one.model, rehearse=rehearse)
    model, positive = case.load(), case.conditioning()
    negative = [[torch.zeros_like(context), extra] for context, extra in positive]
    empty = torch.zeros(case.sizes[one.size])
    blocks = offload_models.num_blocks(model)

    def run(patched: Any, number: int) -> Sampled:
        where = (patched, empty, positive, negative)
        return sample_timed(*where, seed=4000 + number, num_steps=NUM_STEPS, cfg=one.cfg)

    about = (
        f"random weights, bf16, {blocks}{NUM_STEPS} steps, cfg {one.cfg:g}, "
        f"latent {tuple(empty.shape)}"
    )
    return Subject(one.title, about, model, run, family=one.family)
