"""apply_offload(model, config): the technique on a clone of a MODEL."""

import logging
from dataclasses import dataclass
from typing import Any

from .. import host as comfy
from ..architectures import find
from ..calls import CALL, call_options
from ..memory import host as memory
from ..memory.section import gib
from ..run import Run, attach, current
from . import host
from .blocks import units_of
from .budget import (
    KEY,
    NAME,
    buffer_bytes,
    install,
    on_clone,
    on_load,
    prepare_sampling,
    why_no_prefetch,
)
from .config import GIB, OffloadConfig, OffloadError
from .state import OffloadState
from .trial import Memo

log = logging.getLogger("slipstream")
_SMALL_BYTES = 16 * 1024  # ComfyUI 0.33 loads modules up to this size in any case


@dataclass(frozen=True)
class OffloadTechnique:
    """Offload as attached to a MODEL."""

    config: OffloadConfig
    name: str = NAME

    def start(self, run: Run) -> OffloadState:
        return OffloadState(run, self.config)


def apply_offload(model: Any, config: OffloadConfig) -> Any:
    """A clone of `model` whose weights take no more VRAM than `config` allows.

    Replaces an earlier application. mode off leaves a clone that behaves like `model`, and so does
    every mode on a machine without VRAM: workflows travel. Raises OffloadError where mode manual
    asks for what this model, device or ComfyUI cannot do.
    """
    if config.mode == "manual":
        _check_manual(model, config)
    patched = model.clone()
    for kind, callback in (("on_load_after", on_load), ("on_clone", on_clone)):
        patched.remove_callbacks_with_key(kind, KEY)
        patched.add_callback_with_key(kind, KEY, callback)
    patched.remove_wrappers_with_key("prepare_sampling", KEY)
    patched.add_wrapper_with_key("prepare_sampling", KEY, prepare_sampling)
    patched.remove_wrappers_with_key("apply_model", KEY)
    patched.add_wrapper_with_key("apply_model", KEY, hook_blocks)
    patched.set_attachments(KEY, Memo())
    attach(patched, OffloadTechnique(config))
    return install(patched)


def hook_blocks(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: block hooks for one model call, under those of a cache."""
    options = call_options(args, kwargs)
    run = current(options)
    state = run.states.get(NAME) if run is not None else None
    if options is None or not isinstance(state, OffloadState):
        return executor(*args, **kwargs)
    latent = args[0] if args else kwargs.get("x")
    batch = tuple(getattr(latent, "shape", ()))
    with state.model_call(options[CALL], executor.class_obj.diffusion_model, batch):
        return executor(*args, **kwargs)


def _check_manual(model: Any, config: OffloadConfig) -> None:
    """The two numbers of mode manual are followed exactly, or refused with the fix."""
    reason = host.no_vram(model)
    if reason is not None:
        log.info("Slipstream Layer Offload: nothing to do, %s", reason)
        return
    reason = host.unsupported(model)
    if reason is not None:
        raise OffloadError(f"mode manual: {reason}. Choose mode auto or off.")
    total = memory.weight_bytes(model)
    if config.budget_bytes is None:
        raise OffloadError(
            f"mode manual needs vram_budget_gb above 0; this model's weights are {gib(total)} GiB."
        )
    if config.prefetch < 0:
        return
    reason = why_no_prefetch(model, config)
    if reason is not None:
        raise OffloadError(f"{reason}: set prefetch to -1; the budget still applies.")
    _check_depth(model, config)
    needed = buffer_bytes(model, config) + small_bytes(model)
    if config.budget_bytes < min(needed, total):
        name = type(comfy.diffusion_model(model)).__name__
        raise OffloadError(
            f"vram_budget_gb {config.vram_budget_gb:g} is too small: small weights and block "
            f"buffers of {name} need {-(-needed * 10 // GIB) / 10:.1f} GiB. Raise it or set "
            "prefetch to -1."
        )


def _check_depth(model: Any, config: OffloadConfig) -> None:
    """Dynamic mode stages one block per stream of ComfyUI's."""
    network = comfy.diffusion_model(model)
    depth = config.depth(len({unit.block for unit in units_of(network, find(network))}))
    streams = host.num_offload_streams()
    if memory.is_dynamic(model) and depth > streams - 1:
        raise OffloadError(
            f"prefetch {depth} needs ComfyUI started with --async-offload {depth + 1} "
            f"(it has {streams} streams); use prefetch {streams - 1}."
        )


def small_bytes(model: Any) -> int:
    """Bytes of the weights that ComfyUI's dynamic mode loads whatever the cap."""
    network = comfy.diffusion_model(model)
    sizes = (sum(p.nbytes for p in m.parameters(recurse=False)) for m in network.modules())
    return sum(size for size in sizes if size <= _SMALL_BYTES)
