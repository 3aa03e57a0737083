"""Loads an SVDQuant file as ComfyUI's own model class (ComfyUI 0.33).

With host_dtype, host_operations, host_patcher and host_files the only part of SVDQuant that
knows ComfyUI. Imports happen when called.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import host, run
from .assemble import Assembled, assemble
from .config import SVDQuantConfig
from .dialects import Checkpoint, detect
from .engine import Engine, request_of
from .errors import CheckpointError
from .families import CORE
from .halves import read_model_header
from .host_cache import Found, find_or_make
from .host_detection import model_title
from .host_dtype import pick_dtypes
from .host_operations import mixed_operations, operations
from .host_patcher import quantised_layers, with_patcher
from .layout import is_quantised, unwrap, wrap
from .measure import prove
from .notices import notices
from .segments import CPU
from .technique import KEY, Loaded, SVDQuantTechnique
from .variants import variant_notes
from .weight import QuantWeight

log = logging.getLogger("slipstream")
RELOADABLE = ("load_svdquant",)  # what a worker process may call
UNPACKING_BYTES = 2**30  # free on the GPU: the largest layer in several forms, and other programs


def load_svdquant(
    path: str, config: dict[str, Any] | None = None, disable_dynamic: bool = False
) -> Any:
    """A MODEL (ModelPatcher) from an SVDQuant file, with the report's technique attached.

    Its arguments are JSON: ComfyUI repeats the call for a clone on another device, our workers in
    another process. Raises ValueError with the sentence for the user.
    """
    import comfy.model_management
    import comfy.sd

    settings = SVDQuantConfig.from_json(config or {})
    checkpoint = detect(read_model_header(path))
    check_widgets(checkpoint, settings)
    device = comfy.model_management.get_torch_device()
    dtypes = pick_dtypes(checkpoint, settings, device)  # refuses before anything is read
    engine = Engine(settings.backend, compute=dtypes.compute)
    model = read_model(
        checkpoint, engine, dtypes.storage, device, keep_unpacked=settings.keep_unpacked
    )
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(model.state),
        model_options={
            "custom_operations": operations(
                engine, mixed_operations(checkpoint, dtypes.compute, device)
            ),
            "dtype": dtypes.storage,
        },
        metadata=checkpoint.header.metadata if checkpoint.native else None,
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:
        raise CheckpointError(
            f"{checkpoint.header.path.name}: ComfyUI does not know this {checkpoint.family.title} "
            "variant. Update ComfyUI."
        )
    finish(patcher, checkpoint, engine, model)
    prove(model.samples, device, engine, comfy.model_management.free_memory)
    if device.type == "cuda" and settings.backend == "auto" and settings.dtype != "fp32":
        technique = run.attached(patcher)[KEY]
        assert isinstance(technique, SVDQuantTechnique)
        engine.notices = notices(engine, model.samples, device, technique.loaded.title)
    patcher.cached_patcher_init = (load_svdquant, (str(path), settings.to_json()))
    return patcher


@dataclass
class ReadModel:
    """A file's tensors under ComfyUI's names, quantised ones wrapped; samples: a weight of each
    precision; weight_bytes: of all quantised weights; form: for people; copy: what was said of its
    unpacked copy."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: dict[str, QuantWeight] = field(default_factory=dict)
    weight_bytes: int = 0
    form: str = ""
    copy: str = ""


def read_model(
    checkpoint: Checkpoint,
    engine: Engine,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep_unpacked: bool = False,
) -> ReadModel:
    """The whole file: mapped from its unpacked copy (made first if there is none), or in memory.

    Raises BackendError before much is read.
    """

    def unpack() -> Iterator[Assembled]:
        return unpacked(checkpoint, engine, dtype, device)

    found = Found(None)
    if keep_unpacked:
        found = find_or_make(checkpoint, dtype, unpack)
    model = ReadModel(copy=found.sentence)
    for name, value in unpack() if found.state is None else found.state.items():
        tensor = wrap(value, dtype) if isinstance(value, QuantWeight) else value
        if is_quantised(tensor):
            weight = unwrap(tensor)
            check_backend(engine, weight, device)
            model.weight_bytes += weight.num_bytes
            model.samples.setdefault(weight.segments[0].facts.precision, weight)
        model.state[name] = tensor
    return model


def unpacked(
    checkpoint: Checkpoint, engine: Engine, dtype: torch.dtype, device: torch.device
) -> Iterator[Assembled]:
    """`assemble` with a progress bar, on a GPU that has room for it."""
    import comfy.utils

    bar = comfy.utils.ProgressBar(len(checkpoint.layers) + len(checkpoint.dense))
    unpack_on = CPU
    if device.type == "cuda" and host.free_memory(device) >= UNPACKING_BYTES:
        unpack_on = device
    for name, value in assemble(checkpoint, dtype, unpack_on):
        if isinstance(value, QuantWeight):
            check_backend(engine, value, device)
        yield name, value
        bar.update(1)
    if unpack_on is not CPU:
        host.release_cached_memory()


def finish(patcher: Any, checkpoint: Checkpoint, engine: Engine, model: ReadModel) -> None:
    """Checks that the network took every tensor; gives it our patcher class and the report, and
    the engine the dtype that ComfyUI gave the network."""
    loaded = patcher.model.model_config.process_unet_state_dict(dict(model.state))
    check_names(checkpoint, patcher.model.diffusion_model, set(loaded))
    with_patcher(patcher)
    engine.compute = patcher.model.get_dtype_inference()
    run.attach(patcher, technique_of(checkpoint, patcher, engine, model))


def technique_of(
    checkpoint: Checkpoint, patcher: Any, engine: Engine, model: ReadModel
) -> SVDQuantTechnique:
    """What the report shows of this model."""
    layers = quantised_layers(patcher.model)
    for name, module in layers.items():
        module.layer_name = name.removeprefix("diffusion_model.")
    title, family = checkpoint.family.title, checkpoint.family.id
    if checkpoint.family is CORE:
        config = patcher.model.model_config
        title, family = model_title(patcher.model.diffusion_model, config), type(config).__name__
    loaded = Loaded(
        title=title,
        family=family,
        dialect=checkpoint.dialect,
        weight_bytes=model.weight_bytes,
        keys=tuple(f"{name}.weight" for name in layers),
        notes=tuple(variant_notes(checkpoint)),
        copy=model.copy,
    )
    return SVDQuantTechnique(loaded, engine)


def notice_of(patcher: Any) -> str:
    """What the loader's node should show of a loaded model; "" for nothing."""
    technique = run.attached(patcher)[KEY]
    assert isinstance(technique, SVDQuantTechnique)
    found = (*technique.engine.notices, *technique.loaded.notes, technique.loaded.copy)
    return "\n".join(sentence for sentence in found if sentence)


def check_backend(engine: Engine, weight: QuantWeight, device: torch.device) -> None:
    """Raise BackendError if the backend that was asked for can run nothing of a 4-bit layer."""
    segments = [s for s in weight.segments if s.facts.precision != "awq"]
    requests = [request_of(s, device, engine.compute) for s in segments]
    if requests and not any(s.facts.unsigned for s in weight.segments):
        engine.require(requests)


def check_widgets(checkpoint: Checkpoint, config: SVDQuantConfig) -> None:
    """precision and rank are assertions: raise if the file is something else."""
    what = {"int4": "int4 (16-bit scales, group 64)", "nvfp4": "nvfp4 (fp8 scales, group 16)"}
    if config.precision not in ("auto", checkpoint.precision):
        found = what.get(checkpoint.precision, checkpoint.precision)
        raise CheckpointError(
            f"The file is {found}, but precision={config.precision} was requested. Choose auto."
        )
    if config.rank and checkpoint.ranks != (config.rank,):
        found = ", ".join(map(str, checkpoint.ranks))
        raise CheckpointError(
            f"The file has rank {found}, but rank={config.rank} was requested. Choose 0."
        )


def check_names(checkpoint: Checkpoint, network: torch.nn.Module, given: set[str]) -> None:
    """Every tensor of the network came from the file, and the other way round.

    given: names as ComfyUI's model class has renamed them. Core only logs either; the image would
    be noise. In a family that only core knows, buffers that core fills itself may be missing and
    16-bit tensors that core's own loader passes over may be left: that is logged.
    """
    wanted = set(network.state_dict())
    for name, module in network.named_modules():
        if hasattr(module, "has_bias"):
            wanted.add(f"{name}.weight")
            wanted |= {f"{name}.bias"} if module.has_bias else set()
    wanted, given = (_without_scales(checkpoint, names) for names in (wanted, given))
    missing, extra = wanted - given, given - wanted
    if checkpoint.family is CORE:
        quantised = {f"{name}.weight" for name in (*checkpoint.layers, *checkpoint.core_layers)}
        passed = (missing & {n for n, _ in network.named_buffers()}) | (extra - quantised)
        missing, extra = missing - passed, extra - passed
        if passed:
            log.warning(
                "%s: %d tensors are not in both the file and ComfyUI's model, as with Load "
                "Diffusion Model: %s",
                checkpoint.header.path.name,
                len(passed),
                ", ".join(sorted(passed)[:5]),
            )
    file, family = checkpoint.header.path.name, checkpoint.family.title
    if missing:
        raise CheckpointError(
            f"{file} lacks {len(missing)} tensors of {family} ({', '.join(sorted(missing)[:3])}): "
            "it is truncated or a variant that is not supported"
        )
    if extra:
        raise CheckpointError(
            f"{file} has {len(extra)} tensors that ComfyUI's {family} does not have "
            f"({', '.join(sorted(extra)[:3])}): it is a variant that is not supported"
        )


def _without_scales(checkpoint: Checkpoint, names: set[str]) -> set[str]:
    """`names` without what ComfyUI reads beside the weight of its own quantised layers."""
    owners = tuple(checkpoint.core_layers)
    kept = {f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")}
    return {
        n for n in names if n in kept or not any(n == o or n.startswith(f"{o}.") for o in owners)
    }
