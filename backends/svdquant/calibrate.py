"""Records the inputs of a model's layers while it samples, for Convert.

A clone of the MODEL gets hooks for the length of each model call; the end of a run merges what
was seen into a file under the calibration's name. The result of the run is unchanged.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import host, run
from ..report import Section
from .errors import CheckpointError
from .families import FAMILIES, SUPPORTED, Family
from .statistics import Statistics, load_statistics

log = logging.getLogger("slipstream")
KEY = "svdquant_calibrate"
WRAPPER = "slipstream.svdquant_calibrate"


def apply_calibrate(model: Any, path: Path) -> Any:
    """A clone of `model` that records into `path`. Raises ValueError for an unknown family."""
    network = host.diffusion_model(model)
    layers = recorded_layers(network)
    clone = model.clone()
    if path.is_file():
        check_same_model(load_statistics(path), path, network, layers)
    run.attach(clone, CalibrateTechnique(path, tuple(layers)))
    clone.remove_wrappers_with_key("apply_model", WRAPPER)
    clone.add_wrapper_with_key("apply_model", WRAPPER, record_call)
    return clone


def recorded_layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name -> module of every layer that Convert smooths, of a known family."""
    modules = dict(network.named_modules())
    family = next((f for f in FAMILIES if f.matches_native(modules)), None)
    if family is None:
        raise ValueError(
            f"SVDQuant Calibrate knows {SUPPORTED}; this model is {type(network).__name__}."
        )
    layers = {name: module for name, module in modules.items() if _is_smoothed(family, name)}
    if any(getattr(module, "quantised", False) for module in layers.values()):
        raise ValueError("This model is 4-bit already: calibrate the 16-bit model.")
    return layers


def _is_smoothed(family: Family, name: str) -> bool:
    for block in family.blocks:
        place = block.in_target(name)
        if place is not None:
            return any(layer.target == place[1] and not layer.chunks for layer in block.layers)
    return False


def check_same_model(
    known: Statistics, path: Path, network: torch.nn.Module, layers: dict[str, torch.nn.Module]
) -> None:
    """Raise CheckpointError if a statistics file was recorded on another model."""
    same = known.model == type(network).__name__ and all(
        name in layers and inputs.absmax.shape[0] == getattr(layers[name], "in_features", 0)
        for name, inputs in known.layers.items()
    )
    if not same:
        raise CheckpointError(
            f"The calibration '{path.stem}' was recorded on another model ({known.model}): "
            "choose another name."
        )


@dataclass(frozen=True)
class CalibrateTechnique:
    """Attached to the clone; layers: names of the modules to record."""

    path: Path
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        return KEY

    def start(self, run: run.Run) -> "CalibrateState":
        return CalibrateState(self, host.diffusion_model(run.patcher))


class CalibrateState:
    """One run's statistics."""

    keeps_tensors = True

    def __init__(self, technique: CalibrateTechnique, network: torch.nn.Module):
        self.technique = technique
        self.modules = {name: network.get_submodule(name) for name in technique.layers}
        self.statistics = Statistics(type(network).__name__, num_runs=1)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks on every layer while the body runs."""
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.statistics.record(name, args[0])

        return hook

    def section(self) -> Section:
        path, seen = self.technique.path, len(self.statistics.layers)
        if not seen:
            return Section({"layers": 0, "file": ""}, ("SVDQuant Calibrate: nothing was recorded",))
        merged = self.statistics
        try:
            if path.is_file():
                merged = load_statistics(path)
                merged.merge(self.statistics)
            merged.save(path)
        except (OSError, CheckpointError) as error:
            line = f"SVDQuant Calibrate could not save {path.name}: {error}"
            log.error("%s", line)
            return Section({"layers": seen, "file": "", "error": str(error)}, (line,))
        line = f"SVDQuant Calibrate: inputs of {seen} layers in {path.name}, {merged.num_runs} runs"
        return Section({"layers": seen, "file": path.name, "runs": merged.num_runs}, (line,))

    def close(self) -> None:
        self.modules = {}
        self.statistics = Statistics("")


def record_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: one model call with the hooks on."""
    current = run.current(run.call_options(args, kwargs))
    state = current.states.get(KEY) if current is not None else None
    if not isinstance(state, CalibrateState):
        return executor(*args, **kwargs)
    with state.recording():
        return executor(*args, **kwargs)
