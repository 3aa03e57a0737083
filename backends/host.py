"""The only engine module that touches ComfyUI: what a patcher carries, the device, versions, files.

Everything imports ComfyUI when called, so that the engine works on a stand-in without it. Facts
about ComfyUI hold for 0.33; a private name is probed, never assumed.
"""

import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Wrapper key -> feature name of conflicts.py: other caches mark themselves by these keys.
_WRAPPER_FEATURES = {
    "easycache": "easycache",
    "lazycache": "lazycache",
    "teacache": "teacache",
    "torch.compile": "torch_compile",
}
# transformer_options key -> feature: ComfyUI-TeaCache; Jasonzzt's ComfyUI-CacheDiT (two keys).
_OPTION_FEATURES = {
    "rel_l1_thresh": "teacache",
    "enable_teacache": "teacache",
    "cache_dit_turbo": "other_cache",
    "wan_cache": "other_cache",
}
# Words in the name of a model_function_wrapper that belongs to another cache (WaveSpeed, MagCache).
_CACHE_WORDS = ("fbcache", "first_block_cache", "wavespeed", "magcache", "teacache")

# Distributions that decide which kernels run and how fast they are.
_PACKAGES = (
    "comfy-kitchen",
    "sageattention",
    "sageattn3",
    "spas-sage-attn",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "triton",
    "triton-windows",
    "cache-dit",
)


def diffusion_model(patcher: Any) -> torch.nn.Module:
    """The network of a MODEL, for example comfy.ldm.flux.model.Flux."""
    return patcher.model.diffusion_model


def percent_to_sigma(patcher: Any) -> Callable[[float], float] | None:
    """The schedule of a MODEL's own sampling, patches of it included; None on a stand-in."""
    ask = getattr(patcher, "get_model_object", None)
    sampling = ask("model_sampling") if ask is not None else None
    return getattr(sampling, "percent_to_sigma", None)


def wrapper_keys(patcher: Any) -> set[str]:
    """Keys of all wrappers on a MODEL: on the patcher, and in its transformer_options."""
    options = patcher.model_options.get("transformer_options", {})
    kinds = [*patcher.wrappers.values(), *options.get("wrappers", {}).values()]
    return {key for by_key in kinds for key, wrappers in by_key.items() if wrappers and key}


def features(patcher: Any) -> set[str]:
    """Features of ComfyUI and other packs on this MODEL, by the names of conflicts.py."""
    found = {_WRAPPER_FEATURES[k] for k in wrapper_keys(patcher) if k in _WRAPPER_FEATURES}
    options = patcher.model_options.get("transformer_options", {})
    if "easycache" in options and "lazycache" not in found:  # LazyCache uses the same option
        found.add("easycache")
    found |= {feature for key, feature in _OPTION_FEATURES.items() if key in options}
    wrapper = patcher.model_options.get("model_function_wrapper")
    if wrapper is not None and "teacache" not in found:
        name = qualified_name(wrapper).lower()
        if any(word in name for word in _CACHE_WORDS):
            found.add("other_cache")
    if getattr(patcher, "additional_models", {}).get("multigpu"):
        found.add("multigpu_cfg_split")
    found |= _own_memory_features(patcher)
    if hasattr(patcher, "slipstream_features"):  # a patcher of ours that knows more
        found |= patcher.slipstream_features()
    return found


def _own_memory_features(patcher: Any) -> set[str]:
    """Features of other packs that place or move this MODEL's weights themselves."""
    model = getattr(patcher, "model", None)
    network_class = type(getattr(model, "diffusion_model", None))
    found = set()
    if hasattr(model, "_distorch_v2_meta"):  # ComfyUI-MultiGPU, on the models it distributes
        found.add("distorch2")
    if "nunchaku" in network_class.__module__.lower():
        found.add("nunchaku_pack")
    if {"FSDPModule", "FullyShardedDataParallel"} & {c.__name__ for c in network_class.__mro__}:
        found.add("fsdp")
    return found


def is_compiled_whole(patcher: Any) -> bool:
    """Whether torch.compile has made the whole network one graph, not single blocks of it.

    comfy_api/torch_helpers/torch_compile.py (0.33) keeps the compiled modules in its wrapper's
    closure, by attribute path.
    """
    compiled = getattr(diffusion_model(patcher), "_compiled_call_impl", None) is not None
    for wrapper in patcher.get_wrappers("apply_model", "torch.compile"):
        modules = inspect.getclosurevars(wrapper).nonlocals.get("compiled_module_dict", {})
        compiled |= "diffusion_model" in modules
    return compiled


@cache
def _package_versions() -> dict[str, str]:
    """Versions of the installed _PACKAGES; looked up once, it takes milliseconds."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """Versions that a report needs: ComfyUI, torch and, where installed, the kernel packages."""
    found: dict[str, str] = {"torch": torch.__version__}
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    comfy = sys.modules.get("comfyui_version")
    if comfy is None and "comfy" in sys.modules:
        try:
            import comfyui_version as comfy  # type: ignore[import-not-found,no-redef]
        except ImportError:
            comfy = None
    if comfy is not None:
        found["comfyui"] = comfy.__version__
    found.update(_package_versions())
    return found


def device_name(device: torch.device) -> str:
    """The accelerator's product name, or the device type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def attention_function(name: str | None) -> Callable[..., torch.Tensor] | None:
    """ComfyUI's attention function of this name (None: the one of this process), or None."""
    if "comfy" not in sys.modules:
        return None
    from comfy.ldm.modules import attention

    function = getattr(attention, name or "optimized_attention", None)
    return getattr(function, "__wrapped__", function) if name else function


def preferred_attention(
    network: torch.nn.Module,
) -> dict[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Attention functions that the checkpoint asks for, by the module that names them.

    ComfyUI 0.40 and later: wrap_attn takes them off a call before it asks an override.
    """
    attention = sys.modules.get("comfy.ldm.modules.attention")
    kind = getattr(attention, "ComfyAttention", None)
    if kind is None:
        return {}
    named = ((m, m.function) for m in network.modules() if isinstance(m, kind))
    return {module: function for module, function in named if function is not None}


def model_file(patcher: Any) -> str | None:
    """Name, size and date of the file that a MODEL was loaded from; None if it is not known."""
    recipe = getattr(patcher, "cached_patcher_init", None)
    paths = [arg for arg in recipe[1] if isinstance(arg, str)] if recipe else []
    if not paths or not Path(paths[0]).is_file():
        return None
    stat = Path(paths[0]).stat()
    return f"{Path(paths[0]).name} {stat.st_size} {stat.st_mtime_ns}"


def qualified_name(function: Any) -> str:
    """module.qualname of a function or of an object's class, for reports.

    ComfyUI names a pack's module after its folder's path; the folder's name is enough.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    module = named.__module__.replace("\\", "/").rpartition("/")[2]
    return f"{module}.{named.__qualname__}"


def override_target(override: Any) -> Callable[..., torch.Tensor] | None:
    """The attention function that core's ModelAttentionBackend put into its override, or None.

    ModelPatcher.set_model_optimized_attention (0.33) keeps it in its closure.
    """
    if not inspect.isfunction(override):
        return None
    if "set_model_optimized_attention" not in override.__qualname__:
        return None
    return inspect.getclosurevars(override).nonlocals.get("optimized_attention")


def is_interrupt(error: BaseException) -> bool:
    """Whether `error` is the user's cancel, an exception of comfy.model_management."""
    return any(kind.__name__ == "InterruptProcessingException" for kind in type(error).__mro__)


def raise_if_cancelled() -> None:
    """Raise ComfyUI's own exception if the user has cancelled the prompt."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def progress(total: int) -> Callable[[int], None]:
    """A progress bar on the node that runs now: call it with how many more are done."""
    if "comfy" not in sys.modules:
        return lambda count: None
    import comfy.utils

    return comfy.utils.ProgressBar(total).update


def input_folder() -> Path:
    """ComfyUI's input folder, where users put files for nodes."""
    import folder_paths  # type: ignore[import-not-found]

    return Path(folder_paths.get_input_directory())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, as ComfyUI counts: torch's cached blocks are free too."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        return int(management.get_free_memory(device))
    return int(torch.cuda.mem_get_info(device)[0])


def release_cached_memory() -> None:
    """Hand torch's cached blocks back, after an allocation has failed."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.soft_empty_cache()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()


def user_folder() -> Path | None:
    """ComfyUI's user folder, where measurements are kept between starts; None outside ComfyUI."""
    if "comfy" not in sys.modules:
        return None
    try:
        import folder_paths  # type: ignore[import-not-found]
    except ImportError:
        return None
    return Path(folder_paths.get_user_directory())


def show_text_on_running_node(text: str) -> None:
    """Show text on the node that runs now (the sampler, inside a run)."""
    show_text(text, getattr(_server(), "last_node_id", None))


def _server() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_text(text: str, node_id: str | None) -> None:
    """Show text on a node while its prompt runs; does nothing without a server.

    The page reads it as Markdown: two spaces keep a line's end (frontend 1.49).
    """
    instance = _server()
    if instance is not None and node_id is not None:
        instance.send_progress_text(text.replace("\n", "  \n"), node_id)
