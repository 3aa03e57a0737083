"""What each step of SVDQuant's quantiser buys, on synthetic layers with and without outliers.

    python bench svdquant_methods [--size 3072] [--seeds 2] [--out docs/benchmarks]

Relative error of a layer's output against the 16-bit layer, on inputs that calibration has not
seen: W4A4 with 4-bit inputs as the kernels round them, W4A16 with full inputs. The layers have a
power-law spectrum, heavy weights and uneven inputs, or are Gaussian; they are not trained.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..backends.svdquant.quantize import Quantised, quantise, quantise_inputs, round_int4
from ..backends.svdquant.smoothing import choose_smooth
from .environment import environment
from .setup_env import PACK_ROOT
from .svdquant_pages import methods_page

NUM_INPUTS = 256


def layer(size: int, seed: int, outliers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, N] and inputs [M, N], half of them for calibration."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * NUM_INPUTS, size, generator=g)
    if not outliers:
        return torch.randn(size, size, generator=g) * 0.02, inputs
    rank = size // 4
    power = torch.arange(1, rank + 1).float() ** -0.6
    low = (torch.randn(size, rank, generator=g) * power) @ torch.randn(rank, size, generator=g)
    noise = torch.randn(size, size, generator=g)
    noise *= 1 + (torch.rand(size, size, generator=g) < 0.002).float() * 4
    weight = (0.6 * low / low.norm() + 0.8 * noise / noise.norm()) * size * 0.02
    hot = torch.randperm(size, generator=g)[: size // 128]
    weight[:, hot] *= torch.rand(len(hot), generator=g) * 3 + 1.5
    scale = torch.exp(torch.randn(size, generator=g) * 0.5)
    hot = torch.randperm(size, generator=g)[: size // 100]
    scale[hot] *= torch.rand(len(hot), generator=g) * 15 + 4
    return weight, inputs * scale


def errors(
    weight: torch.Tensor, quantised: Quantised, inputs: torch.Tensor, precision: str
) -> tuple[float, float]:
    """(W4A4, W4A16) of one layer."""
    wanted, smoothed = inputs @ weight.t(), inputs / quantised.smooth.float()
    side = (inputs @ quantised.down.float()) @ quantised.up.float().t()
    dense = quantised.codes.dense().t()

    def error(x: torch.Tensor) -> float:
        return float((x @ dense + side - wanted).norm() / wanted.norm())

    return error(quantise_inputs(smoothed, precision)), error(smoothed)


def methods(
    weight: torch.Tensor, known: torch.Tensor
) -> dict[str, tuple[str, Callable[[], Quantised]]]:
    """Name -> (precision, how); known: the inputs that calibration sees."""

    def plain() -> Quantised:
        ones = torch.ones(weight.shape[1])
        nothing = torch.zeros(weight.shape[1], 1)
        return Quantised(round_int4(weight), ones, nothing, torch.zeros(weight.shape[0], 1))

    def smoothed(rank: int, precision: str = "int4", search: bool = False) -> Quantised:
        absmax, rows = known.abs().amax(0), known[:64]
        smooth = choose_smooth(weight, absmax, rows, rank=rank, precision=precision)
        return quantise(weight, rank=rank, precision=precision, smooth=smooth, search=search)

    return {
        "plain rounding, groups of 64": ("int4", plain),
        "rank 32": ("int4", lambda: quantise(weight, rank=32)),
        "rank 128": ("int4", lambda: quantise(weight, rank=128)),
        "calibrated, rank 32": ("int4", lambda: smoothed(32)),
        "calibrated, rank 32, search": ("int4", lambda: smoothed(32, search=True)),
        "calibrated, rank 128": ("int4", lambda: smoothed(128)),
        "nvfp4, rank 32": ("nvfp4", lambda: quantise(weight, rank=32, precision="nvfp4")),
        "nvfp4, calibrated, rank 32": ("nvfp4", lambda: smoothed(32, "nvfp4")),
    }


def mean_errors(size: int, num_seeds: int, outliers: bool) -> dict[str, list[float]]:
    """Method -> [W4A4, W4A16], the mean over the seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(num_seeds):
        weight, inputs = layer(size, seed, outliers)
        known, unseen = inputs.chunk(2)
        for name, (precision, how) in methods(weight, known).items():
            pair = errors(weight, how(), unseen, precision)
            found.setdefault(name, []).append(pair)
    return {
        name: [round(sum(pair[i] for pair in pairs) / num_seeds, 4) for i in (0, 1)]
        for name, pairs in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=3072)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PACK_ROOT / "output" / "bench")
    options = parser.parse_args()
    made = environment(cpu=True)
    heavy, gaussian = (mean_errors(options.size, options.seeds, kind) for kind in (True, False))
    found = {
        "command": f"python bench svdquant_methods --size {options.size} --seeds {options.seeds}",
        "environment": made,
        "size": options.size,
        "num_seeds": options.seeds,
        "rows": [
            {"name": name, "outliers": heavy[name], "gaussian": gaussian[name]} for name in heavy
        ],
    }
    page = methods_page(found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "svdquant-methods.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "svdquant-methods.md").write_text(page, "utf-8")
    print(page)
    return 0
