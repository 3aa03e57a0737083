"""How good patched pictures are, against plain ones of the same seeds.

A score is PSNR (mean, pooled, 10th percentile), SSIM and, where it was timed, paired speed.
Accuracy is compared by discordant pairs only, on as many pictures as the claim needs: one seed of
64 is 1.6 points, so a difference of 2 points takes about a thousand.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .draw import CLASSES
from .judge import psnr, ssim
from .paired import ratio
from .trained import Sampled, TrainedModel


def score(name: str, pictures: Tensor, reference: Tensor) -> dict[str, Any]:
    """A point of a curve. pooled: the PSNR of the mean squared error of all pictures, on which
    pictures that are identical (100 dB) have no more weight than they deserve."""
    found = psnr(pictures, reference)
    pooled = psnr(pictures.flatten(0, 1)[None], reference.flatten(0, 1)[None])
    return {
        "name": name,
        "psnr_db": round(found.mean().item(), 2),
        "psnr_pooled_db": round(pooled.item(), 2),
        "psnr_p10_db": round(found.quantile(0.1).item(), 2),
        "ssim": round(ssim(pictures, reference).mean().item(), 4),
    }


def sample_singly(demo: TrainedModel, model: Any, number: int) -> Sampled:
    """Picture `number` of the curves: class in turn, its own seed, batch 1."""
    return demo.sample([number % len(CLASSES)], seed=5000 + number, model=model)


def timed_points(
    demo: TrainedModel, models: dict[str, Any], num_seeds: int, bar: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(points, pictures by name) of models that take turns with the plain one, named "plain"."""
    from .paired import BASELINE, take_turns

    sides = {BASELINE: demo.model, **models}
    runs: dict[str, list[Sampled]] = {name: [] for name in sides}
    for model in sides.values():
        sample_singly(demo, model, 0)

    def runner(name: str) -> Any:
        def once(number: int) -> float:
            runs[name].append(sample_singly(demo, sides[name], number))
            return runs[name][-1].seconds

        return once

    bar.reset(total=num_seeds * len(sides))
    seconds = take_turns({name: runner(name) for name in sides}, num_seeds, on_run=bar.update)
    num = len(seconds[BASELINE])
    pictures = {
        name: demo.decode(torch.cat([run.latents for run in series[:num]]))
        for name, series in runs.items()
    }
    points = []
    for name in models:
        point = score(name, pictures[name], pictures[BASELINE])
        points.append(point | {"speed": ratio(seconds[BASELINE], seconds[name]).to_json()})
    return points, pictures


def accuracy_row(name: str, right: Tensor, plain: Tensor | None) -> dict[str, Any]:
    """One line of the accuracy table; right and plain: [N] of bool for the same seeds."""
    row: dict[str, Any] = {"name": name, "num_right": int(right.sum())}
    if plain is not None:
        only_plain, only_here = int((plain & ~right).sum()), int((right & ~plain).sum())
        p_value = discordant_p(only_plain, only_here)
        row |= {"only_plain": only_plain, "only_here": only_here, "p_value": p_value}
    return row


def discordant_p(one: int, other: int) -> float:
    """Two-sided exact binomial p of discordant pairs (McNemar); 1 without any."""
    num = one + other
    tail = sum(math.comb(num, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**num)
