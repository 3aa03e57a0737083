"""The models that the suite samples: the trained one, at its own size and larger, and a small Wan.

A subject is sampled by the code under the KSampler node and timed by its callback, so that nothing
is attached to the MODEL but what is measured. subjects_gpu.py has those of full width.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .demo_models import TEXT_DIM, _save
from .draw import CLASSES, SIZE
from .trained import CFG, NUM_STEPS, Sampled, TrainedModel

_WAN = "slipstream_suite_wan.safetensors"
WAN_BLOCKS = 12  # caches keep up to 8 at the front and need more behind them


@dataclass
class Subject:
    """A model and one way to sample it.

    run(model, number) samples once; number picks class and seed. decode: latents to pictures,
    None where they would mean nothing; family: as other packs' nodes want to be told.
    """

    name: str
    about: str
    model: Any
    run: Callable[[Any, int], Sampled]
    decode: Callable[[Tensor], Tensor] | None = None
    family: str = "flux"


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
    """A Wan of random weights, narrow and with many blocks: what a mechanism costs and saves.

    folder: gets the file that ComfyUI's loader reads.
    """
    import comfy.ops
    import folder_paths
    from comfy.ldm.wan.model import WanModel

    network = WanModel(
        model_type="t2v", dim=128, ffn_dim=512, num_heads=1, num_layers=WAN_BLOCKS, in_dim=16,
        out_dim=16, text_dim=TEXT_DIM, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    not_in_weights = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}
    _save(folder / _WAN, network, seed=1, metadata=not_in_weights)
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    model = demo.loaders.UNETLoader().load_unet(_WAN, "default")[0]
    text = torch.randn(1, 8, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    positive, negative = [[text, {}]], [[torch.zeros_like(text), {}]]
    empty = torch.zeros(1, 16, 3, 24, 24)

    def run(patched: Any, number: int) -> Sampled:
        where = (patched, empty, positive, negative)
        return demo.run(*where, seed=3000 + number, num_steps=num_steps, cfg=CFG)

    about = (
        f"random weights, {WAN_BLOCKS} blocks, {num_steps} steps, cfg {CFG:g}, 3 latent frames, "
        "432 tokens"
    )
    return Subject("small Wan", about, model, run, family="wan")
