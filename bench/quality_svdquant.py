"""SVDQuant's curve of the quality lab: what 4 bits cost, and what rank and calibration give back.

Every linear layer of the blocks but the modulation is replaced by what the 4-bit kernels compute,
with the pack's own quantiser, in fp32: weights in 4 bits, inputs in 4 bits or in full. No speed:
that needs the kernels. All layers take signed inputs here; the file format's unsigned ones do not
exist in this measurement.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.svdquant.quantize import Quantised, quantise, quantise_inputs
from ..backends.svdquant.smoothing import choose_smooth
from ..backends.svdquant.statistics import Statistics
from .quality_report import Lab
from .scores import score

NUM_PICTURES, _BATCH = 40, 40
_CALIBRATION_SEEDS = range(4)  # other seeds than the pictures'
RANKS = (0, 8, 16, 32)


def curves(lab: Lab) -> list[dict[str, Any]]:
    """int4 weights, with 4-bit inputs as the kernels have them and with full ones."""
    network = lab.demo.model.model.diffusion_model
    linears = block_linears(network)
    statistics = record_inputs(lab, linears)
    plain, _ = lab.demo.pictures(NUM_PICTURES, batch=_BATCH)
    lab.bar.reset(total=2 * 2 * len(RANKS))
    found = []
    for precision, is_w4a4 in (("int4", True), ("int4", False)):
        inputs = "4-bit inputs" if is_w4a4 else "full inputs"
        lab.bar.set_description(f"SVDQuant {precision}, {inputs}")
        points = []
        for calibrated in (False, True):
            for rank in RANKS:
                layers = {
                    name: _quantised(linear, statistics, name, rank, precision, calibrated)
                    for name, linear in linears.items()
                }
                with replaced(linears, layers, precision if is_w4a4 else None):
                    pictures, _ = lab.demo.pictures(NUM_PICTURES, batch=_BATCH)
                word = "rounding" if rank == 0 else f"rank {rank}"
                name = f"{word}, calibrated" if calibrated else word
                point = score(name, pictures, plain)
                point["weight_error"] = _weight_error(linears, layers)
                points.append(point)
                lab.bar.update()
        found.append(
            {
                "title": f"SVDQuant: {precision} weights, {inputs}",
                "about": f"{len(linears)} layers of width {network.hidden_size}; "
                f"{NUM_PICTURES} pictures in one batch. Rank 8 is 1/16 of the width; "
                "files hold multiples of 16.",
                "columns": {"weight_error": "weight error"},
                "points": points,
            }
        )
    return found


def block_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers that SVDQuant takes, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and "_blocks." in name
        and "mod" not in name.split(".")[2]  # img_mod, txt_mod, modulation
    }


def record_inputs(lab: Lab, linears: dict[str, nn.Linear]) -> Statistics:
    """What calibration records, over a few plain runs."""
    statistics = Statistics("Flux")
    hooks = [
        linear.register_forward_pre_hook(
            lambda module, args, name=name: statistics.record(name, args[0])
        )
        for name, linear in linears.items()
    ]
    try:
        for seed in _CALIBRATION_SEEDS:
            lab.demo.sample(list(range(10)), seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics


@contextmanager
def replaced(
    linears: dict[str, nn.Linear], layers: dict[str, Quantised], inputs: str | None
) -> Iterator[None]:
    """Within, every layer gives what its quantised form gives; inputs: their precision or None."""
    hooks = [
        linear.register_forward_hook(_output_of(layers[name], inputs))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output_of(layer: Quantised, inputs: str | None) -> Any:
    codes, smooth = layer.codes.dense(), layer.smooth.float()
    down, up = layer.down.float(), layer.up.float()

    def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        smoothed = x / smooth
        rounded = smoothed if inputs is None else quantise_inputs(smoothed, inputs)
        out = rounded @ codes.t() + (x @ down) @ up.t()
        if module.bias is not None:
            out = out + module.bias.float()
        return out.view(output.shape).to(output.dtype)

    return hook


def _quantised(
    linear: nn.Linear, statistics: Statistics, name: str, rank: int, precision: str, smooth: bool
) -> Quantised:
    weight, seen = linear.weight.detach().float(), statistics.layers[name]
    factors = None
    if smooth:
        rows = seen.rows.float()
        factors = choose_smooth(weight, seen.absmax, rows, rank=rank, precision=precision)
    return quantise(weight, rank=rank, precision=precision, smooth=factors)


def _weight_error(linears: dict[str, nn.Linear], layers: dict[str, Quantised]) -> float:
    """Mean relative error of the dense weights."""
    errors = [
        (
            (layers[name].dense() - linear.weight.float()).norm() / linear.weight.float().norm()
        ).item()
        for name, linear in linears.items()
    ]
    return round(torch.tensor(errors).mean().item(), 4)
