"""apply_parallel(model, config): sequence parallel on a clone of a MODEL; the glue to ComfyUI."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..backends import host, worker_host
from ..backends.architectures import find
from ..backends.architectures.tokens import TokenPlan
from ..backends.calls import CALL, call_options
from ..backends.run import Run, attach, attached, current
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
from .network_call import NetworkCall
from .payload import encode_patches, walk_patches
from .pool import Model, Pool
from .probe import LinkCheck
from .route import BRANCH, Baton, can_route, run_both
from .run_state import ParallelRun, no_workers
from .runs import KEY, NAME
from .shards import PlanError
from .shared import BeginAgain, Shared
from .wire import Unsupported, encode, encode_plain
from .workers import WorkerError

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
        plan = checked_plan(network)
        recipe = worker_host.recipe(run.patcher, OWN_PACKAGE)
        reason = plan if isinstance(plan, str) else worker_host.obstacle(run.patcher)
        techniques = travelling(run)
        if reason is None and isinstance(techniques, str):
            reason = techniques
        if reason is None and isinstance(recipe, str):
            if self.config.is_explicit:
                raise ParallelError(recipe)
            reason = recipe
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
        assert isinstance(plan, TokenPlan)
        assert isinstance(techniques, dict)
        shared = Shared(
            pool=pool(),
            devices=devices,
            device=device,
            setting=_setting(self.config, len(devices)),
            model=model,
            network=network,
            plan=plan,
            num_heads=num_heads(network, plan),
            techniques=techniques,
            meanwhile=worker_host.raise_if_interrupted,
            memory_bytes=partial(worker_host.memory_required, run.patcher),
            busy_devices=partial(_busy_devices, devices[1:]),
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
    for kind in _WRAPPERS:
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
    for kind, wrapper in _WRAPPERS.items():
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


# --- hooks of ComfyUI


def _state(options: dict[str, Any] | None) -> ParallelRun | None:
    run = current(options)
    state = run.states.get(NAME) if run is not None else None
    return state if isinstance(state, ParallelRun) else None


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL wrapper: one call of the network."""
    options = call_options(args, kwargs)
    state = _state(options)
    if state is None:
        return executor(*args, **kwargs)
    assert options is not None
    try:
        call = NetworkCall.of(executor.original, args, kwargs)
    except Unsupported as error:
        return state.alone(str(error), options[CALL], lambda: executor(*args, **kwargs))
    return state.call(executor, call, executor.original.__name__, executor.class_obj)


def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper, for networks that run no DIFFUSION_MODEL wrappers (SD3, OmniGen2).

    Their forward is taken over for one call.
    """
    options = call_options(args, kwargs)
    state = _state(options)
    network = executor.class_obj.diffusion_model
    architecture = find(network)
    wraps = architecture is None or architecture.notes.diffusion_model_wrappers
    if state is None or wraps or "forward" in network.__dict__:
        return executor(*args, **kwargs)
    assert options is not None
    state.prepare(options[CALL], network, options)
    try:
        with _taken_over(network, state):
            return executor(*args, **kwargs)
    except BeginAgain as again:
        reason = again.reason
    if reason:
        options[CALL].num_ranks = 1
        return state.alone(reason, options[CALL], lambda: executor(*args, **kwargs))
    with _taken_over(network, state):
        return executor(*args, **kwargs)


@contextmanager
def _taken_over(network: torch.nn.Module, state: ParallelRun) -> Iterator[None]:
    original = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = NetworkCall.of(original, args, kwargs)
        return state.call(original, call, "forward", network, is_decided=True)

    network.__dict__["forward"] = forward
    try:
        yield
    finally:
        del network.__dict__["forward"]


def calc_cond_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """CALC_COND_BATCH wrapper: chooses the layout, and runs two conditionings on two branches."""
    names = ("model", "conds", "x_in", "timestep", "model_options")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    model, conds, model_options = given["model"], given["conds"], given["model_options"]
    state = _state(model_options.get("transformer_options"))
    if state is None or state.shared is None or state.baton is not None:
        return executor(*args, **kwargs)
    if state.refusal(model.diffusion_model, model_options["transformer_options"]) is not None:
        return executor(*args, **kwargs)  # what the prompts have in one call stays together
    routable = can_route(conds) and "cache" not in state.shared.techniques
    layout = state.choose(2 if routable else 1)
    if layout is None:
        return executor(*args, **kwargs)
    with _divided_memory(model, layout.ranks):
        if layout.cfg == 1 or not routable:
            return executor(*args, **kwargs)
        return _routed(state, executor, given)


def _routed(state: ParallelRun, executor: Any, given: dict[str, Any]) -> Any:
    """Two conditionings at once, on two branches; one after the other where that fails."""
    model, conds, model_options = given["model"], given["conds"], given["model_options"]
    assert state.shared is not None

    def branch(number: int) -> Any:
        own = [cond if i == number else None for i, cond in enumerate(conds)]
        options = model_options["transformer_options"]
        marked = {**model_options, "transformer_options": {**options, BRANCH: number}}
        return executor(model, own, given["x_in"], given["timestep"], marked)[number]

    state.baton = Baton()
    try:
        with state.recovered():
            return list(
                run_both(
                    state.baton,
                    lambda: branch(0),
                    lambda: branch(1),
                    device=state.shared.device,
                    stop_first=worker_host.interrupt,
                )
            )
    except PlanError as error:
        state.stop_sharing(str(error))
    except StartFailed as error:
        if state.config.is_explicit:
            raise
        state.stop_sharing(no_workers(error))
    finally:
        state.baton = None
    return executor(model, conds, given["x_in"], given["timestep"], model_options)


def prepare_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: workers load while this process does, and it needs its part only.

    Activations are divided by the ranks, so that ComfyUI keeps as much of the weights here as the
    workers do there.
    """
    names = ("model", "noise_shape", "conds", "model_options")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    state = _state((given["model_options"] or {}).get("transformer_options"))
    if state is None or state.shared is None:
        return executor(*args, **kwargs)
    state.begin_workers(given["noise_shape"])
    with _divided_memory(given["model"].model, state.least_ranks):
        return executor(*args, **kwargs)


@contextmanager
def _divided_memory(model: Any, ranks: int) -> Iterator[None]:
    """Have `model` (a BaseModel) say that a call needs 1/ranks of the memory, for a while."""
    whole = model.memory_required

    def memory_required(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **kwargs) / ranks

    before = model.__dict__.get("memory_required")
    model.memory_required = memory_required
    try:
        yield
    finally:
        del model.memory_required
        if before is not None:
            model.memory_required = before


def sampler_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """SAMPLER_SAMPLE wrapper: the run is over when the device has done what it was given."""
    result = executor(*args, **kwargs)
    extra_args = kwargs["extra_args"] if "extra_args" in kwargs else args[2]
    state = _state(extra_args["model_options"].get("transformer_options"))
    if state is not None:
        state.settle()
    return result


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


_WRAPPERS = {
    "diffusion_model": diffusion_model,
    "apply_model": apply_model,
    "calc_cond_batch": calc_cond_batch,
    "prepare_sampling": prepare_sampling,
    "sampler_sample": sampler_sample,
}
