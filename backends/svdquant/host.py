"""Loads an SVDQuant file as ComfyUI's own model class (ComfyUI 0.33).

With host_operations, host_patcher and host_files the only part of SVDQuant that knows ComfyUI.
Imports happen when called.
"""

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
from .header import read_header
from .host_cache import Found, find_or_make
from .host_operations import operations
from .host_patcher import quantised_layers, with_patcher
from .layout import is_quantised, unwrap, wrap
from .measure import measured_order
from .segments import CPU, FILE_DTYPES
from .technique import KEY, Loaded, SVDQuantTechnique
from .weight import QuantWeight

RELOADABLE = ("load_svdquant",)  # what a worker process may call
UNPACKING_BYTES = 2**30  # free on the GPU: the largest layer in several forms, and other programs
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    checkpoint = detect(read_header(path))
    check_widgets(checkpoint, settings)
    device = comfy.model_management.get_torch_device()
    dtype = pick_dtype(checkpoint, settings, device)
    engine = Engine(settings.backend)
    model = read_model(checkpoint, engine, dtype, device, keep_unpacked=settings.keep_unpacked)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(model.state),
        model_options={"custom_operations": operations(engine), "dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:
        raise CheckpointError(
            f"{checkpoint.header.path.name}: ComfyUI does not know this {checkpoint.family.title} "
            "variant. Update ComfyUI."
        )
    if settings.backend == "auto":
        engine.order = measured_order(
            model.samples, device, engine, comfy.model_management.free_memory
        )
    finish(patcher, checkpoint, engine, model)
    patcher.cached_patcher_init = (load_svdquant, (str(path), settings.to_json()))
    return patcher


@dataclass
class ReadModel:
    """A file's tensors under ComfyUI's names, quantised ones wrapped; samples: a weight of each
    precision; weight_bytes: of all quantised weights; copy: what was said of its unpacked copy."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: dict[str, QuantWeight] = field(default_factory=dict)
    weight_bytes: int = 0
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
    """Checks that the network took every tensor; gives it our patcher class and the report."""
    check_names(checkpoint, patcher.model.diffusion_model, set(model.state))
    with_patcher(patcher)
    run.attach(patcher, technique_of(checkpoint, patcher, engine, model))


def technique_of(
    checkpoint: Checkpoint, patcher: Any, engine: Engine, model: ReadModel
) -> SVDQuantTechnique:
    """What the report shows of this model."""
    layers = quantised_layers(patcher.model)
    for name, module in layers.items():
        module.layer_name = name.removeprefix("diffusion_model.")
    loaded = Loaded(
        title=checkpoint.family.title,
        family=checkpoint.family.id,
        dialect=checkpoint.dialect,
        weight_bytes=model.weight_bytes,
        keys=tuple(f"{name}.weight" for name in layers),
        copy=model.copy,
    )
    return SVDQuantTechnique(loaded, engine)


def copy_sentence(patcher: Any) -> str:
    """What there is to say of a loaded model's unpacked copy; often nothing."""
    technique = run.attached(patcher)[KEY]
    assert isinstance(technique, SVDQuantTechnique)
    return technique.loaded.copy


def check_backend(engine: Engine, weight: QuantWeight, device: torch.device) -> None:
    """Raise BackendError if the backend that was asked for can run nothing of a 4-bit layer."""
    requests = [request_of(s, device) for s in weight.segments if s.facts.precision != "awq"]
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


def pick_dtype(checkpoint: Checkpoint, config: SVDQuantConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for, else the file's, else fp16 where a GPU has no bf16."""
    import comfy.model_management

    if config.dtype != "auto":
        return DTYPES[config.dtype]
    dtype = FILE_DTYPES[checkpoint.dtype]
    is_gpu = device.type != "cpu"
    if dtype is torch.bfloat16 and is_gpu and not comfy.model_management.should_use_bf16(device):
        return torch.float16
    return dtype


def check_names(checkpoint: Checkpoint, network: torch.nn.Module, given: set[str]) -> None:
    """Every tensor of the network came from the file, and the other way round.

    Core only logs either; the image would be noise.
    """
    wanted = set(network.state_dict())
    for name, module in network.named_modules():
        if hasattr(module, "has_bias"):
            wanted.add(f"{name}.weight")
            wanted |= {f"{name}.bias"} if module.has_bias else set()
    file, family = checkpoint.header.path.name, checkpoint.family.title
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing:
        raise CheckpointError(
            f"{file} lacks {len(missing)} tensors of {family} ({', '.join(missing[:3])}): "
            "it is truncated or a variant that is not supported"
        )
    if extra:
        raise CheckpointError(
            f"{file} has {len(extra)} tensors that ComfyUI's {family} does not have "
            f"({', '.join(extra[:3])}): it is a variant that is not supported"
        )
