"""TeaCache (arXiv 2411.19108): decide before any block, from the timestep-modulated input.

The relative change of that input, mapped by a polynomial fitted per model, is summed up until it
passes the threshold. Coefficients and thresholds are the published ones of ali-vilab/TeaCache
(Apache-2.0); the files are named below. Models without published coefficients are refused.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from .builtin import BuiltinEngine
from .config import CacheConfig
from .engine import Answer, limit_reached, relative_change
from .stack import Probe


@dataclass(frozen=True)
class Coefficients:
    """polynomial: highest power first; thresholds: published for least and most speed."""

    polynomial: tuple[float, ...]
    thresholds: tuple[float, float]
    probe: Probe


def coefficients_of(network: torch.nn.Module) -> Coefficients | None:
    """What is published for this network, or None."""
    names = {cls.__name__ for cls in type(network).__mro__}
    if "WanModel" in names:
        return _wan(network)
    if "HunyuanVideo" in names:
        return HUNYUAN_VIDEO
    if "Flux" in names and not getattr(network.params, "global_modulation", False):
        return FLUX
    return None


def threshold_of(coefficients: Coefficients, cache_ratio: float | None) -> float:
    """Between the published thresholds."""
    low, high = coefficients.thresholds
    return low + (high - low) * (0.5 if cache_ratio is None else cache_ratio)


class TeaCacheEngine(BuiltinEngine):
    """Sums up the mapped change since the last computed call; `diff` in the report is that sum."""

    def __init__(self, config: CacheConfig, coefficients: Coefficients):
        super().__init__(config)
        self._polynomial = coefficients.polynomial
        self._totals: dict[Hashable, float] = {}

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        branch = self._branches[key]
        if metric is None or branch.front is None or branch.front.shape != metric.shape:
            return Answer(False, None, "no metric")
        mapped = 0.0
        change = relative_change(branch.front, metric)
        for coefficient in self._polynomial:
            mapped = mapped * change + coefficient
        total = self._totals[key] = self._totals.get(key, 0.0) + abs(mapped)
        limit = limit_reached(
            self._config, num_cached=branch.num_cached, streak=branch.streak, accumulated=0.0
        )
        reuse = limit is None and total < self._config.residual_diff_threshold
        return Answer(reuse, total, limit or ("below" if reuse else "above") + " threshold")

    def settle(self, key: Hashable, reuse: bool) -> None:
        super().settle(key, reuse)
        if not reuse:
            self._totals[key] = 0.0

    def observe(self, key: Hashable, reuse: bool, metric: torch.Tensor) -> None:
        self._branches[key].front = metric  # compared with the call before, computed or not

    def drop(self, key: Hashable) -> None:
        super().drop(key)
        self._totals.pop(key, None)


def _probe_dual(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Modulated image input of a Flux double block (comfy/ldm/flux/layers.py, 0.33)."""
    block = getattr(block, "_orig_mod", block)
    modulation, _ = block.img_mod(kwargs["vec"])
    normed = block.img_norm1(kwargs["img"])
    return normed * (1 + modulation.scale[:, :1]) + modulation.shift[:, :1]


def _probe_wan(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The projected time embedding, as TeaCache4Wan2.1 takes it with use_ret_steps."""
    return kwargs["e"].clone()


# TeaCache4FLUX/teacache_flux.py: 0.25 for 1.5x, 0.8 for 2.25x
FLUX = Coefficients(
    (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    (0.25, 0.8),
    _probe_dual,
)
# TeaCache4HunyuanVideo/teacache_sample_video.py: 0.1 for 1.6x, 0.15 for 2.1x
HUNYUAN_VIDEO = Coefficients(
    (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    (0.1, 0.15),
    _probe_dual,
)
# TeaCache4Wan2.1/teacache_generate.py with use_ret_steps, thresholds from its README
WAN_1_3B = Coefficients(
    (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    (0.05, 0.10),
    _probe_wan,
)
WAN_14B = Coefficients(
    (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    (0.10, 0.20),
    _probe_wan,
)
WAN_14B_I2V = Coefficients(
    (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    (0.20, 0.30),
    _probe_wan,
)


def _wan(network: Any) -> Coefficients:
    """By depth and kind: 40 layers are the 14B models, fewer the 1.3B ones."""
    if len(network.blocks) < 40:
        return WAN_1_3B
    return WAN_14B_I2V if getattr(network, "model_type", "") == "i2v" else WAN_14B
