"""The models that the suite samples: the trained one, at its own size and larger, and a small Wan.

A subject is sampled by the code under the KSampler node and timed by its callback, so that nothing
is attached to the MODEL but what is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import demo_models
from .draw import CLASSES, SIZE
from .trained import CFG, NUM_STEPS, Sampled, TrainedModel


@dataclass
class Subject:
    """A model and one way to sample it.

    run(model, number) samples once; number picks class and seed. decode: latents to pictures,
    None where they would mean nothing.
    """

    name: str
    about: str
    model: Any
    run: Callable[[Any, int], Sampled]
    decode: Callable[[Tensor], Tensor] | None = None


def trained_subject(demo: TrainedModel, *, size: int, num_steps: int = NUM_STEPS) -> Subject:
    """The trained model; above 64 x 64 its pictures mean nothing and only time is measured."""

    def run(model: Any, number: int) -> Sampled:
        labels, seed = [number % len(CLASSES)], 2000 + number
        return demo.sample(labels, seed=seed, model=model, size=size, num_steps=num_steps)

    about = f"{num_steps} steps, cfg {CFG:g}, batch 1, {(size // 16) ** 2} image tokens"
    if size == SIZE:
        return Subject(f"trained Flux, {size} x {size}", about, demo.model, run, demo.decode)
    about += "; larger than it was trained on: time only"
    return Subject(f"trained Flux, {size} x {size}", about, demo.model, run)


def wan_subject(demo: TrainedModel, folder: Path, *, num_steps: int = 12) -> Subject:
    """A Wan of random weights: what a mechanism costs and saves, never how a clip looks.

    folder: a models folder that demo_models.py wrote.
    """
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(folder / "diffusion_models"))
    model = demo.loaders.UNETLoader().load_unet(demo_models.WAN, "default")[0]
    text = torch.randn(1, 8, demo_models.TEXT_DIM, generator=torch.Generator().manual_seed(0))
    positive, negative = [[text, {}]], [[torch.zeros_like(text), {}]]
    empty = torch.zeros(1, 16, 5, 30, 30)

    def run(patched: Any, number: int) -> Sampled:
        where = (patched, empty, positive, negative)
        return demo.run(*where, seed=3000 + number, num_steps=num_steps, cfg=CFG)

    about = f"random weights, {num_steps} steps, cfg {CFG:g}, 5 latent frames, 1125 tokens"
    return Subject("small Wan", about, model, run)
