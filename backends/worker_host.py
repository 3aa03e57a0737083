"""ComfyUI as worker processes need it: its arguments, recorded loaders, weight patches.

Rank 0 asks what a MODEL was loaded with and what patches it carries; a worker becomes a ComfyUI
without server, nodes and custom nodes, and repeats the loading. Facts hold for ComfyUI 0.33.
"""

import enum
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Loaders of comfy.sd that give a ModelPatcher (or a tuple with one) from paths and options alone.
LOADERS = (
    "load_diffusion_model",
    "load_checkpoint_guess_config",
    "load_checkpoint_guess_config_model_only",
)

_NUM_PRINTED, _NUM_VALUES = 16, 64


@dataclass(frozen=True)
class Recipe:
    """How a MODEL was loaded: module.function(*arguments), then [index] if there is one."""

    module: str
    function: str
    arguments: tuple[Any, ...]
    index: int | None

    @property
    def files(self) -> list[Path]:
        """Files among the arguments."""
        paths = [Path(a) for a in self.arguments if isinstance(a, str) and a]
        return [path for path in paths if path.is_file()]


# --- rank 0


def recipe(patcher: Any, own_package: str) -> Recipe | str:
    """The Recipe that the loader recorded, or the sentence that says why workers cannot follow it.

    own_package: this pack's root package, whose loaders are named relative to it (".backends...").
    """
    recorded = getattr(patcher, "cached_patcher_init", None)
    if recorded is None:
        return (
            "This model came from a loader that workers cannot repeat (it recorded none). "
            "Use a core loader or ours."
        )
    function, arguments, *rest = recorded
    module, name = function.__module__, function.__qualname__
    if module.startswith(own_package + "."):
        module = module.removeprefix(own_package)
    elif module != "comfy.sd" or name not in LOADERS:
        return (
            f"This model came from a loader that workers cannot repeat ({module}.{name}). "
            "Use a core loader or ours."
        )
    return Recipe(module, name, tuple(arguments), rest[0] if rest else None)


def weights_print(patcher: Any, names: Sequence[str] = ()) -> dict[str, list[float]]:
    """The first values of some weights as they were loaded: parameter name -> values.

    names: of these; else of a few parameters that no patch touches, spread over the network.
    """
    changed = [*patcher.patches, *patcher.backup]  # the latter by whichever clone ran last
    patched_ones = {key.removeprefix("diffusion_model.") for key in changed}
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    plain = [
        name
        for name, value in parameters.items()
        if name not in patched_ones and type(value) is torch.nn.Parameter and not value.is_meta
    ]
    chosen = names or plain[:: max(len(plain) // _NUM_PRINTED, 1)]
    return {
        name: parameters[name].detach().flatten()[:_NUM_VALUES].float().cpu().tolist()
        for name in chosen
        if name in parameters
    }


def comfyui_folder() -> Path:
    """The checkout that this process runs."""
    import comfy

    (folder, *_) = comfy.__path__
    return Path(folder).parent


def comfyui_arguments() -> dict[str, Any]:
    """ComfyUI's command line arguments; enums as ("enum", class name, value).

    A shared call has its compiler off (0.35 and later), whatever this run or an outer one has set.
    """
    from comfy.cli_args import args

    found = {name: _plain(value) for name, value in vars(args).items()}
    if "disable_comfy_compiler" in found:
        found["disable_comfy_compiler"] = True
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return ("enum", type(value).__name__, value.value)
    if isinstance(value, (set, frozenset)):
        return ("set", *(_plain(v) for v in value))
    if isinstance(value, (list, tuple)):
        return ["list", *(_plain(v) for v in value)]
    return str(value) if isinstance(value, Path) else value


def adapter_parts(value: Any) -> tuple[str, list[str], Any] | None:
    """(class name, loaded keys, weights) of one of ComfyUI's weight adapters, else None."""
    from comfy import weight_adapter

    if type(value) not in weight_adapter.adapters:
        return None
    return type(value).__name__, sorted(value.loaded_keys), value.weights


def obstacle(patcher: Any) -> str | None:
    """What is on this MODEL that workers cannot have, or None."""
    found = {
        "hook patches (weights that change during a run)": patcher.hook_patches,
        "injections": patcher.injections,
        "weight wrappers": patcher.weight_wrapper_patches,
    }
    names = [name for name, present in found.items() if present]
    return f"{' and '.join(names)} cannot travel to workers" if names else None


@dataclass(frozen=True)
class Attributes:
    """What a MODEL replaces of the model's attributes, as far as its network sees them.

    values: path below the model -> value; casts_weights: every layer casts its weights to the
    dtype of its input, as ModelComputeDtype wants it.
    """

    values: dict[str, Any]
    casts_weights: bool

    def __post_init__(self) -> None:
        for path in self.values:
            if not _is_seen_by_network(path):
                raise ValueError(f"{path} is not the network's")


def attributes(patcher: Any) -> Attributes:
    """What nodes have put on this MODEL. The sampler's parts (model_sampling) stay on rank 0."""
    seen = {p: v for p, v in patcher.object_patches.items() if _is_seen_by_network(p)}
    return Attributes(seen, bool(patcher.force_cast_weights))


def _is_seen_by_network(path: str) -> bool:
    return path == "manual_cast_dtype" or path.split(".")[0] == "diffusion_model"


def memory_required(patcher: Any, shape: Sequence[int]) -> int:
    """Bytes that ComfyUI expects one model call on a latent of this shape to need."""
    return int(patcher.memory_required(list(shape)))


def come_together(conds: Sequence[Any], x: torch.Tensor, timestep: torch.Tensor) -> bool:
    """Whether ComfyUI puts all these conditionings into one model call, if memory allows.

    False too where a newer ComfyUI decides otherwise than 0.33 does.
    """
    import comfy.samplers

    read = getattr(comfy.samplers, "get_area_and_mult", None)
    can_join = getattr(comfy.samplers, "can_concat_cond", None)
    if read is None or can_join is None:
        return False
    found = [read(one, x, timestep) for cond in conds for one in cond or ()]
    found = [one for one in found if one is not None]
    return len(found) > 1 and all(can_join(one, found[0]) for one in found)


def raise_if_interrupted() -> None:
    """Raise what ComfyUI raises if the user has pressed Cancel."""
    import comfy.model_management as management

    management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    """Whether the user has pressed Cancel; leaves it so."""
    import comfy.model_management as management

    return bool(management.processing_interrupted())


def is_prompt_running() -> bool:
    """Whether this thread executes a node: what is unloaded meanwhile makes room for another."""
    from comfy_execution.utils import get_executing_context

    return get_executing_context() is not None


def devices_in_use() -> list[str]:
    """The devices that ComfyUI's own models are on."""
    import comfy.model_management as management

    found = (str(one.device) for one in management.current_loaded_models)
    return sorted({name for name in found if name.startswith("cuda")})


def num_loaded() -> int:
    """Models that ComfyUI has on a device."""
    import comfy.model_management as management

    return len(management.current_loaded_models)


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process's tensors had on the device since the last question."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def interrupt(value: bool) -> None:
    """Make the running model call raise at its next operation, or take that back."""
    import comfy.model_management as management

    management.interrupt_current_processing(value)


def progress_bar(total: int) -> Callable[[int, int], None]:
    """A function (value, total) that shows progress on the node that runs."""
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)
    return lambda value, total: bar.update_absolute(value, total)


# --- workers


def become_comfyui(folder: str, arguments: dict[str, Any]) -> None:
    """Make `comfy` importable with these arguments, and set up its memory management.

    The folder is on sys.path before anything of ComfyUI is imported, and the arguments are set
    before comfy.model_management is: the device is picked at its import. Dynamic VRAM is
    initialised as main.py does it (unverified: needs a GPU).
    """
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy import cli_args

    for name, value in arguments.items():
        setattr(cli_args.args, name, _read(value, cli_args))
    if cli_args.enables_dynamic_vram():
        _init_aimdo(cli_args.args)  # before anything allocates on the device, as main.py does
    import comfy.model_management
    import comfy.sd

    if _has_dynamic_vram(cli_args):
        _enable_dynamic_vram()


def _read(value: Any, cli_args: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    kind, *rest = value
    if kind == "enum":
        return getattr(cli_args, rest[0])(rest[1])
    read = (_read(v, cli_args) for v in rest)
    return set(read) if kind == "set" else list(read)


def _init_aimdo(args: Any) -> None:
    """With the options that this comfy-aimdo takes: 0.4.11, 0.4.10, or 0.4.9 with none."""
    import comfy_aimdo.control as control  # type: ignore[import-not-found]

    reserve = getattr(args, "reserve_vram", None)
    headroom = None if reserve is None else int(reserve * 1024**3)
    pressure = not getattr(args, "disable_nvml_pressure", False)
    for options in (
        {"simple_vram_headroom": headroom, "nvml_pressure": pressure},
        {"simple_vram_headroom": headroom},
        {},
    ):
        try:
            control.init(**options)
            return
        except TypeError:
            continue


def _has_dynamic_vram(cli_args: Any) -> bool:
    """As main.py decides (0.33): NVIDIA, ROCm 7.14, or where the user insists."""
    import comfy.model_management as management

    if getattr(cli_args.args, "enable_dynamic_vram", False):
        return True
    if not cli_args.enables_dynamic_vram():
        return False
    is_new_rocm = management.is_amd() and management.rocm_version >= (7, 14)
    return bool(management.is_nvidia() or is_new_rocm)


def _enable_dynamic_vram() -> None:
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy_aimdo.control as control
    from comfy.cli_args import args

    devices = [device.index for device in management.get_all_torch_devices()]
    headroom = int(getattr(args, "vram_headroom", 0) * 1024**3)
    try:
        ready = control.init_devices((index, headroom) for index in devices)
    except TypeError:  # comfy-aimdo 0.4.9
        ready = control.init_devices(iter(devices))
    if ready:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def load(wanted: Recipe, own_package: str) -> Any:
    """A fresh ModelPatcher by the recipe, its weights mapped from the file where they can be.

    Raises ValueError for a loader that is not admitted.
    """
    import importlib

    if wanted.module.startswith("."):
        module = importlib.import_module(wanted.module, own_package)
        if wanted.function not in getattr(module, "RELOADABLE", ()):
            raise ValueError(f"{wanted.module}.{wanted.function} is not a loader for workers")
        found = getattr(module, wanted.function)(*wanted.arguments)  # it has a patcher of its own
        return found if wanted.index is None else found[wanted.index]
    if wanted.module == "comfy.sd" and wanted.function in LOADERS:
        module = importlib.import_module("comfy.sd")
    else:
        raise ValueError(f"{wanted.module}.{wanted.function} is not a loader for workers")
    function: Callable[..., Any] = getattr(module, wanted.function)
    with _mapped_weights() as settle:
        found = function(*wanted.arguments)
        return settle(found if wanted.index is None else found[wanted.index])


@contextmanager
def _mapped_weights() -> Iterator[Callable[[Any], Any]]:
    """Load by assigning the file's mapped tensors instead of copying them.

    ComfyUI assigns for dynamic patchers only; CoreModelPatcher is the class main.py exchanges to
    choose them. The patcher is an ordinary one afterwards. Tensors of another dtype than the
    network's are converted, as copying would have done.
    """
    import comfy.model_patcher as patchers

    plain = patchers.ModelPatcher

    class Mapped(plain):  # type: ignore[misc, valid-type]
        def is_dynamic(self) -> bool:
            return True

    def settle(patcher: Any) -> Any:
        if type(patcher) is Mapped:
            patcher.__class__ = plain
            for module in patcher.model.diffusion_model.modules():
                _match_dtypes(module)
        return patcher

    before = patchers.CoreModelPatcher
    if before is plain:
        patchers.CoreModelPatcher = Mapped
    try:
        yield settle
    finally:
        patchers.CoreModelPatcher = before


def _match_dtypes(module: torch.nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        wanted = getattr(module, f"{name}_comfy_model_dtype", None)
        if isinstance(wanted, torch.dtype) and parameter.dtype != wanted:
            setattr(module, name, torch.nn.Parameter(parameter.to(wanted), requires_grad=False))


def adapter(name: str, keys: Sequence[str], weights: Any) -> Any:
    """One of ComfyUI's weight adapters. Raises ValueError for any other class."""
    from comfy import weight_adapter

    for cls in weight_adapter.adapters:
        if cls.__name__ == name:
            return cls(set(keys), weights)
    raise ValueError(f"{name!r} is not a weight adapter of this ComfyUI")


def patched(
    patcher: Any, patches: dict[str, list[Any]], version: Any, attributes: Attributes
) -> Any:
    """A clone of `patcher` with these weight patches and attributes."""
    clone = patcher.clone()
    clone.patches = patches
    clone.patches_uuid = version
    clone.object_patches = {**clone.object_patches, **attributes.values}
    clone.force_cast_weights = attributes.casts_weights
    return clone


def make_ready(patcher: Any, memory_bytes: int) -> None:
    """Put the model on its device under its budget, memory_bytes left free for a model call."""
    import comfy.model_management as management

    with torch.inference_mode():
        management.load_models_gpu([patcher], memory_required=memory_bytes)


def unload(patcher: Any) -> None:
    """Give back the memory of a model and its clones."""
    import comfy.model_management as management

    management.unload_model_and_clones(patcher)
    management.soft_empty_cache()
