"""Cached runs of tiny models: what ran, what it cost in accuracy, and what is left behind."""

import gc
import itertools
from collections import Counter
from typing import Any

import tiny
import torch
from slipstream.backends.cache import CacheConfig, apply_cache
from slipstream.backends.run import run_log

EASY = {"residual_diff_threshold": 0.99, "warmup": 4}  # random weights differ a lot per step


def cached(model: Any, strategy: str = "fbcache", **settings: Any) -> Any:
    """`model` with a cache that reuses readily, by the built-in engine unless it says otherwise."""
    decider = settings.pop("decider", None)
    settings = {**EASY, "engine": "builtin", "front_blocks": 1, **settings}
    config = CacheConfig.from_ratio(settings.pop("cache_ratio", 0.5), strategy=strategy, **settings)
    return apply_cache(model, config, decider=decider)


def section(model: Any) -> dict[str, Any]:
    """The cache's JSON of the latest run."""
    return run_log(model).latest().to_json()["cache"]


def notes(model: Any) -> dict[str, int]:
    return run_log(model).latest().notes


def flat(samples: Any) -> torch.Tensor:
    parts = samples.unbind() if getattr(samples, "is_nested", False) else (samples,)
    return torch.cat([part.float().flatten() for part in parts])


def relerr(reference: Any, samples: Any) -> float:
    """mean|reference - samples| / mean|reference|: ranks mechanisms, says nothing about quality."""
    a, b = flat(reference), flat(samples)
    return ((a - b).abs().mean() / a.abs().mean()).item()


def equal(a: Any, b: Any) -> bool:
    return torch.equal(flat(a), flat(b))


def network(model: Any) -> torch.nn.Module:
    return model.model.diffusion_model


def is_clean(model: Any) -> bool:
    """No module of the shared network carries a forward of its own."""
    return all("forward" not in module.__dict__ for module in network(model).modules())


class BlockCounter:
    """Counts computed blocks by hooks on a leaf inside each: a skipped block never reaches it."""

    def __init__(self, model: Any, lists: tuple[str, ...]):
        self.counts: Counter[str] = Counter()
        self._handles = []
        for name in lists:
            for block in getattr(network(model), name):
                leaf = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
                self._handles.append(leaf.register_forward_pre_hook(self._counting(name)))

    def _counting(self, name: str) -> Any:
        def count(*args: Any) -> None:
            self.counts[name] += 1

        return count

    def take(self) -> int:
        """Blocks computed since the last take."""
        total = self.counts.total()
        self.counts.clear()
        return total

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def alive_bytes() -> int:
    """Bytes behind every tensor that Python still knows."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if value.layout is torch.strided:  # sparse ones of other tests have no storage to ask
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def sample_twice_each(model: Any, family: str, *, steps: int = 6, cfg: float = 2.0) -> list[Any]:
    """Every step evaluates the model twice at the same point; returns the denoised pairs.

    With a decider that reuses every second evaluation, both of a pair must agree: the residual was
    stored at exactly the input it is added to.
    """
    import comfy.sample
    import comfy.samplers

    pairs = []

    def run(denoise: Any, x: Any, sigmas: Any, extra_args: Any = None, **kwargs: Any) -> Any:
        extra = extra_args or {}
        ones = x.new_ones([x.shape[0]])
        for sigma, following in itertools.pairwise(sigmas):
            before = x.clone()
            pairs.append([denoise(x, sigma * ones, **extra).clone() for _ in range(2)])
            assert torch.equal(x, before), "the sampler's latent was written to"
            x = x + (x - pairs[-1][1]) / sigma * (following - sigma)
        return x

    empty = tiny.latent(family)
    sampling = model.get_model_object("model_sampling")
    comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(empty, 3),
        cfg,
        comfy.samplers.KSAMPLER(run),
        comfy.samplers.calculate_sigmas(sampling, "simple", steps),
        tiny.text(family, seed=1),
        tiny.text(family, seed=2),
        empty,
        disable_pbar=True,
        seed=3,
    )
    return pairs


def every_second(call: Any, reuse: bool) -> bool:
    """A decider for `sample_twice_each`."""
    return call.evaluation % 2 == 1
