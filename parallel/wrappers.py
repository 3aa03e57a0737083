"""ComfyUI's wrappers around a run whose calls are shared, from preparing to the end of sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..backends import worker_host
from ..backends.architectures import find
from ..backends.calls import CALL, call_options
from ..backends.run import current
from .launcher import StartFailed
from .network_call import NetworkCall
from .route import BRANCH, Baton, can_route, run_both
from .run_state import ParallelRun, no_workers
from .runs import NAME
from .shards import PlanError
from .shared import BeginAgain
from .wire import Unsupported


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
    with _divided_memory(given["model"].model, state.least_ranks, plus=state.groups_bytes):
        return executor(*args, **kwargs)


@contextmanager
def _divided_memory(model: Any, ranks: int, *, plus: int = 0) -> Iterator[None]:
    """Have `model` (a BaseModel) say that a call needs 1/ranks of the memory, for a while.

    plus: bytes beside that.
    """
    whole = model.memory_required

    def memory_required(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **kwargs) / ranks + plus

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


WRAPPERS = {
    "diffusion_model": diffusion_model,
    "apply_model": apply_model,
    "calc_cond_batch": calc_cond_batch,
    "prepare_sampling": prepare_sampling,
    "sampler_sample": sampler_sample,
}
