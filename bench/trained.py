"""The trained demo model through ComfyUI's own loaders and sampler, in this process.

    demo = TrainedModel()                       # bench/demo_weights
    sampled = demo.sample([3], seed=1, cfg=3.0)
    pictures = demo.decode(sampled.latents)     # [N, 3, 64, 64] in 0 to 1

UNETLoader, VAELoader and the code under KSampler do the work, so that a patched MODEL is sampled as
a user's would be. A batch of several labels is one CONDITIONING with a row for each.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.memory import counters
from .demo_models import CLASS_VECTORS, FLUX, VAE, WEIGHTS
from .draw import CLASSES, SIZE
from .flow_model import NO_CLASS
from .in_process import use_comfyui
from .judge import is_right, load_classifier
from .train_demo import CLASSIFIER

CFG, NUM_STEPS = 3.0, 20  # what every number about this model is measured at, unless it says else


Clock = Callable[[], float]
# cpu: processor time of this process. With one thread on an idle machine it is the wall time; on a
# busy one it leaves out what others took. It does not count a GPU's work.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK_HELP = "cpu: processor time, for a busy machine; give it --threads 1"


@dataclass(frozen=True)
class Sampled:
    """One run: latents, seconds in all, milliseconds to the end of each step from the one before.

    A step's callback comes before its last arithmetic; the first step carries what precedes it.
    """

    latents: Tensor
    seconds: float
    step_ms: tuple[float, ...]


def sample_timed(
    model: Any,
    empty: Tensor,
    positive: list[Any],
    negative: list[Any],
    *,
    seed: int,
    num_steps: int,
    cfg: float,
    clock: Clock = time.perf_counter,
) -> Sampled:
    """What the KSampler node runs: euler, simple, denoise 1; its preview callback ticks.

    The device has finished at every tick and at the end.
    """
    import comfy.sample

    def now() -> float:
        counters.synchronize(model.load_device)
        return clock()

    latent = comfy.sample.fix_empty_latent_channels(model, empty)
    noise = comfy.sample.prepare_noise(latent, seed)
    how = (num_steps, cfg, "euler", "simple", positive, negative, latent)
    ticks = [now()]
    with torch.inference_mode():
        latents = comfy.sample.sample(
            model,
            noise,
            *how,
            denoise=1.0,
            callback=lambda step, denoised, x, total: ticks.append(now()),
            disable_pbar=True,
            seed=seed,
        )
        seconds = now() - ticks[0]
    step_ms = tuple(round((b - a) * 1000, 3) for a, b in itertools.pairwise(ticks))
    return Sampled(latents.cpu().clone(), seconds, step_ms)


class TrainedModel:
    """model and vae as loaded; classifier; the class vectors.

    folder: where train_demo.py wrote the files; clock: what runs are timed with. Raises SetupError
    without a ComfyUI.
    """

    def __init__(self, folder: Path = WEIGHTS, *, clock: Clock = time.perf_counter):
        use_comfyui(cpu=not torch.cuda.is_available())
        import comfy.utils
        import folder_paths
        from safetensors.torch import load_file

        comfy.utils.set_progress_bar_enabled(False)
        for kind in ("vae", "diffusion_models"):
            folder_paths.add_model_folder_path(kind, str(folder), is_default=True)
        loaders: Any = importlib.import_module("nodes")  # ComfyUI's, not the pack's
        self.loaders, self.clock = loaders, clock
        self.model = loaders.UNETLoader().load_unet(FLUX, "default")[0]
        self.vae = loaders.VAELoader().load_vae(VAE)[0]
        self.classifier = load_classifier(folder / CLASSIFIER)
        vectors = load_file(folder / CLASS_VECTORS)
        self.context, self.pooled = vectors["context"], vectors["pooled"]

    def conditioning(self, labels: Sequence[int]) -> list[Any]:
        """CONDITIONING with one row a label."""
        rows = torch.as_tensor(labels)
        return [[self.context[rows], {"pooled_output": self.pooled[rows]}]]

    def sample(
        self,
        labels: Sequence[int],
        *,
        seed: int,
        cfg: float = CFG,
        num_steps: int = NUM_STEPS,
        model: Any = None,
        size: int = SIZE,
    ) -> Sampled:
        """One run of `model`, by default the plain one, for pictures of size x size."""
        empty = torch.zeros(len(labels), 16, size // 8, size // 8)
        positive, negative = self.conditioning(labels), self.conditioning([NO_CLASS] * len(labels))
        return self.run(
            model or self.model, empty, positive, negative, seed=seed, num_steps=num_steps, cfg=cfg
        )

    def run(
        self,
        model: Any,
        empty: Tensor,
        positive: list[Any],
        negative: list[Any],
        *,
        seed: int,
        num_steps: int,
        cfg: float,
    ) -> Sampled:
        """sample_timed() with the model's clock."""
        return sample_timed(
            model, empty, positive, negative, seed=seed, num_steps=num_steps, cfg=cfg,
            clock=self.clock,
        )  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, 64, 64] in 0 to 1, by VAEDecode's code."""
        with torch.inference_mode():
            return self.vae.decode(latents).movedim(-1, 1).float().clone()

    def is_right(self, pictures: Tensor, labels: Sequence[int]) -> Tensor:
        """[N] of bool: the classifier sees the class that was asked for."""
        return is_right(self.classifier, pictures, torch.as_tensor(labels))

    def pictures(
        self, num: int, *, batch: int = 50, model: Any = None, cfg: float = CFG
    ) -> tuple[Tensor, list[int]]:
        """`num` pictures of the classes in turn, batch i from seed 1000 + i; their labels."""
        labels = [index % len(CLASSES) for index in range(num)]
        starts = range(0, num, batch)
        parts = [
            self.sample(labels[at : at + batch], seed=1000 + at // batch, cfg=cfg, model=model)
            for at in starts
        ]
        return torch.cat([self.decode(part.latents) for part in parts]), labels
