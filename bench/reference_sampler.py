"""The sampling side of the stand-in: guider and euler sampler with ComfyUI's order of hooks (0.33).

outer_sample > prepare_sampling > ON_PRE_RUN > sampler_sample > per evaluation: predict_noise >
calc_cond_batch > ON_PREPARE_STATE > per call: apply_model; ON_CLEANUP at the end, also after an
exception, still inside outer_sample. Wrappers get the same positional arguments as ComfyUI's.
"""

import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import Options, ReferencePatcher, around, copy_containers

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, denoised, x, number of steps


class Euler:
    """The sampler object that SAMPLER_SAMPLE wraps."""

    def sample(
        self,
        guider: "Guider",
        sigmas: Tensor,
        extra_args: Options,
        callback: Callback | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """One evaluation per step; returns the denoised latent."""
        x = sigmas[0] * noise
        for i in range(len(sigmas) - 1):
            denoised = guider(x, sigmas[i].repeat(len(x)), **extra_args)
            if callback is not None:
                callback(i, denoised, x, len(sigmas) - 1)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x


class Guider:
    """ComfyUI's CFGGuider: owns a copy of model_options for the time of one sample()."""

    def __init__(self, model_patcher: ReferencePatcher, *, cfg: float, split_cond: bool = False):
        self.model_patcher, self.cfg, self.split_cond = model_patcher, cfg, split_cond
        self.model_options = model_patcher.model_options
        self.conds: tuple[Tensor, Tensor | None] = _contexts(cfg)
        self.uuids = [uuid.uuid4(), uuid.uuid4()]

    def __call__(
        self, x: Tensor, timestep: Tensor, model_options: Options, seed: int | None = None
    ) -> Tensor:
        options = self.model_options["transformer_options"]
        executor = around("predict_noise", self.predict_noise, self, options)
        return executor.execute(x, timestep, model_options, seed)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: Options, seed: int | None
    ) -> Tensor:
        """One evaluation: the guided denoised latent."""
        options = model_options["transformer_options"]
        executor = around("calc_cond_batch", self._calc_cond_batch, None, options)
        model, conds = self.model_patcher.model, list(self.conds)
        cond, uncond = executor.execute(model, conds, x, timestep, model_options)
        return cond if self.conds[1] is None else uncond + self.cfg * (cond - uncond)

    def _calc_cond_batch(
        self, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Options
    ) -> list[Tensor]:
        for callback in self.model_patcher.get_all_callbacks("on_prepare_state"):
            callback(self.model_patcher, timestep, model_options)
        present = [index for index, cond in enumerate(conds) if cond is not None]
        outs = [torch.zeros_like(x), torch.zeros_like(x)]
        for batch in [[i] for i in present] if self.split_cond else [present[::-1]]:
            options = copy_containers(model_options["transformer_options"])
            options["cond_or_uncond"] = list(batch)
            options["uuids"] = [self.uuids[i] for i in batch]
            options["sigmas"] = timestep
            context = torch.cat([conds[i].to(x).expand(len(x), -1, -1) for i in batch])
            out = model.apply_model(
                torch.cat([x] * len(batch)),
                torch.cat([timestep] * len(batch)),
                c_crossattn=context,
                transformer_options=options,
            )
            for index, chunk in zip(batch, out.chunk(len(batch)), strict=True):
                outs[index] = chunk
        return outs

    def outer_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Euler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        latent_shapes: list[Any] | None = None,
    ) -> Tensor:
        """What OUTER_SAMPLE wraps: load, run the sampler, clean up."""
        patcher, device = self.model_patcher, self.model_patcher.load_device
        options = self.model_options["transformer_options"]
        prepare = around("prepare_sampling", lambda *args, **kwargs: None, None, options)
        prepare.execute(patcher, noise.shape, self.conds, model_options=self.model_options)
        try:
            patcher.model.current_patcher = patcher
            for called in patcher.get_all_callbacks("on_pre_run"):
                called(patcher)
            inner_options = copy_containers(self.model_options)
            inner_options["transformer_options"]["sample_sigmas"] = sigmas
            extra_args = {"model_options": inner_options, "seed": seed}
            executor = around("sampler_sample", sampler.sample, sampler, options)
            noise, sigmas = noise.to(device, torch.float32), sigmas.to(device)
            return executor.execute(
                self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
        finally:
            patcher.model.current_patcher = None
            for called in patcher.get_all_callbacks("on_cleanup"):
                called(patcher)

    def sample(self, noise: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
        """[B, 16, H, W] noise to a latent of the same shape."""
        original = self.model_options
        self.model_options = copy_containers(original)
        options = self.model_options.setdefault("transformer_options", {})
        for name in ("wrappers", "callbacks"):
            merged = options.setdefault(name, {})
            for kind, by_key in copy_containers(getattr(self.model_patcher, name)).items():
                for key, functions in by_key.items():
                    merged.setdefault(kind, {}).setdefault(key, []).extend(functions)
        try:
            executor = around("outer_sample", self.outer_sample, self, options)
            return executor.execute(
                noise,
                torch.zeros_like(noise),
                Euler(),
                sigmas,
                None,
                callback,
                True,
                1,
                latent_shapes=[noise.shape],
            )
        finally:
            self.model_options = original


def _contexts(cfg: float) -> tuple[Tensor, Tensor | None]:
    """Seeded text of the two prompts, [1, 8, 32]; no second one at cfg 1, as in ComfyUI."""
    generator = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(2, 1, 8, 32, generator=generator)
    return cond, None if cfg == 1.0 else uncond


def sample(
    patcher: ReferencePatcher,
    noise: Tensor,
    steps: int = 2,
    split_cond: bool = False,
    cfg: float = 2.0,
    callback: Callback | None = None,
) -> Tensor:
    """Euler on a straight schedule from 1 to 0, cond and uncond in one call or, split, in two."""
    guider = Guider(patcher, cfg=cfg, split_cond=split_cond)
    with torch.no_grad():
        return guider.sample(noise, torch.linspace(1, 0, steps + 1), callback)
