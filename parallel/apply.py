"""apply_parallel(model, config): sequence parallel on a clone of a MODEL; the glue to ComfyUI."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..backends import host, worker_host
from ..backends.architectures.rows import why_whole
from ..backends.run import Run, attach, attached
from .config import ParallelError, SequenceParallelConfig, choose_devices
from .crew import Setting
from .launcher import StartFailed
from .messages import Load
from .model_facts import (
    checked_plan,
    gpus,
    num_heads,
    plain_device,
    travelling,
    why_one_device,
)
from .payload import encode_patches, walk_patches
from .pool import Model, Pool
from .probe import LinkCheck
from .run_state import ParallelRun, no_workers
from .runs import KEY, NAME
from .shared import Shared
from .wire import Unsupported, encode, encode_plain
from .workers import WorkerError
from .wrappers import WRAPPERS

OWN_PACKAGE = (__package__ or "").rpartition(".")[0]


@cache
def pool() -> Pool:
    """The worker processes of this ComfyUI; none runs until a run needs one."""
    check = LinkCheck(host.user_folder())
    return Pool(is_cancelled=worker_host.is_interrupted, check_links=check.environment)


@dataclass(frozen=True)
class SequenceParallel:
    """Sequence parallel as attached to a MODEL."""

    config: SequenceParallelConfig
    name: str = NAME

    def start(self, run: Run) -> ParallelRun:
        """Workers with this MODEL, or the reason why calls stay on one device.

        Raises ParallelError for settings that cannot be had here.
        """
        network = host.diffusion_model(run.patcher)
        device = plain_device(run.patcher.load_device)
        found, alike = gpus(device)
        devices = choose_devices(self.config, found=found, alike=alike, own=str(device))
        if len(devices) == 1:
            if not self.config.workers and not self.config.device_names:
                run.note(why_one_device(device))
            return ParallelRun(run, self.config, None, "one device")
        self.config.check_degrees(len(devices))
        plan, no_plan = checked_plan(network)
        if no_plan:
            run.note(no_plan)
        one_lane = why_whole(network) or ""
        recipe = worker_host.recipe(run.patcher, OWN_PACKAGE)
        techniques = travelling(run)
        reason = worker_host.obstacle(run.patcher)
        if plan is None and (one_lane or self.config.splits_tokens):
            reason = f"{no_plan} {one_lane}".rstrip()
        elif isinstance(techniques, str):
            reason = reason or techniques
        elif reason is None and isinstance(recipe, str):
            if self.config.is_explicit and (plan is not None or self.config.batch > 1):
                raise ParallelError(recipe)
            reason = f"{no_plan} {recipe}".lstrip()
        if reason is None:
            assert isinstance(recipe, worker_host.Recipe)
            reason, model = _model(run.patcher, recipe)
        if self.config.cfg == 2 and isinstance(techniques, dict) and "cache" in techniques:
            run.note(
                "cfg 2 has no use beside the block cache, which decides for both prompts: half of "
                "the workers have nothing to do. Set cfg to 0 or 1."
            )
        if reason is not None:
            run.note(reason)
            return ParallelRun(run, self.config, None, reason)
        assert isinstance(techniques, dict)
        shared = Shared(
            pool=pool(),
            devices=devices,
            device=device,
            setting=_setting(self.config, len(devices)),
            model=model,
            network=network,
            plan=plan,
            num_heads=None if plan is None else num_heads(network, plan),
            no_plan=no_plan,
            one_lane=one_lane,
            techniques=techniques,
            meanwhile=worker_host.raise_if_interrupted,
            memory_bytes=partial(worker_host.memory_required, run.patcher),
            busy_devices=partial(_busy_devices, devices[1:]),
            tell=host.show_text_on_running_node,
        )
        shared.pool.follow(run.patcher.model, model.load.key)
        try:
            shared.pool.prepare(
                devices, shared.setting, model,
                meanwhile=shared.meanwhile, progress=worker_host.progress_bar(len(devices) - 1),
            )  # fmt: skip
        except (StartFailed, WorkerError) as error:
            if self.config.is_explicit:
                raise
            reason = no_workers(error)
            run.note(reason)
            return ParallelRun(run, self.config, None, reason)
        return ParallelRun(run, self.config, shared)


def apply_parallel(model: Any, config: SequenceParallelConfig) -> Any:
    """A clone of `model` whose network calls are shared by worker processes.

    Replaces its own earlier application. One worker leaves the model as it is.
    """
    patched = model.clone()
    for kind in WRAPPERS:
        patched.remove_wrappers_with_key(kind, KEY)
    patched.remove_callbacks_with_key("on_detach_after", KEY)
    options = patched.model_options.setdefault("transformer_options", {})
    if config.workers == 1:
        attached_here = attached(patched)
        attached_here.pop(NAME, None)
        if "slipstream" in options:
            options["slipstream"] = attached_here
        return patched
    attach(patched, SequenceParallel(config))
    for kind, wrapper in WRAPPERS.items():
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.add_callback_with_key("on_detach_after", KEY, _detached)
    return patched


# --- facts of a MODEL


def _model(patcher: Any, recipe: worker_host.Recipe) -> tuple[str | None, Any]:
    """(None, what workers need to have this MODEL), or (the reason why they cannot, None)."""
    try:
        arguments = encode(recipe.arguments, [], "a loader argument")
        walk_patches(patcher.patches, worker_host.adapter_parts)
        found = worker_host.attributes(patcher)
        attributes = encode_plain(found.values, "a replaced part of the model, ")
    except Unsupported as error:
        return f"{error}, which cannot travel to workers", None
    load = Load(
        key=_key(recipe, arguments), module=recipe.module, function=recipe.function,
        arguments=arguments, index=recipe.index, weights=worker_host.weights_print(patcher),
    )  # fmt: skip
    weights = str(patcher.patches_uuid) if patcher.patches else "none"
    version = json.dumps([weights, attributes, found.casts_weights])
    patches = patcher.patches

    def encoded() -> Any:
        return encode_patches(patches, worker_host.adapter_parts)

    return None, Model(
        load=load, version=version, patches=encoded,
        attributes=attributes, casts_weights=found.casts_weights,
    )  # fmt: skip


def _key(recipe: worker_host.Recipe, arguments: Any) -> str:
    """The same for every MODEL that was loaded from the same file in the same way."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in recipe.files]
    return json.dumps([recipe.module, recipe.function, arguments, recipe.index, files])


def _setting(config: SequenceParallelConfig, num_ranks: int) -> Setting:
    return Setting(
        comfyui=str(worker_host.comfyui_folder()),
        arguments=encode(worker_host.comfyui_arguments(), []),
        num_threads=max(torch.get_num_threads() // num_ranks, 1),
        timeout_s=config.timeout_s,
        idle_s=config.idle_s,
    )


def _busy_devices(workers: Sequence[str]) -> list[str]:
    """Devices of workers that a model of this process is on too."""
    return [name for name in worker_host.devices_in_use() if name in workers]


def _detached(patcher: Any, unpatch_all: bool) -> None:
    """ON_DETACH: /free takes the model off the workers' devices too.

    Not when a newer clone takes over (unpatch_all), nor when ComfyUI makes room for another model
    while a prompt runs: a worker's own memory management does that where it must.
    """
    recipe = worker_host.recipe(patcher, OWN_PACKAGE)
    if not unpatch_all or worker_host.is_prompt_running():
        return
    if isinstance(recipe, worker_host.Recipe):
        pool().park(_key(recipe, encode(recipe.arguments, [], "a loader argument")))
