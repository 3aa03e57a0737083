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
from .mesh import Layout
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
    x = kwargs["x"] if "x" in kwargs else args[0]
    state.prepare(options[CALL], network, options, x.shape[0])
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
    model, model_options = given["model"], given["model_options"]
    state = _state(model_options.get("transformer_options"))
    if state is None or state.shared is None or state.pair is not None:
        return executor(*args, **kwargs)
    if state.refusal(model.diffusion_model, model_options["transformer_options"]) is not None:
        return executor(*args, **kwargs)  # what the prompts have in one call stays together
    layout = _layout(state, given)
    if layout is None:
        return executor(*args, **kwargs)
    if layout.cfg == 2:
        return _routed(state, executor, given, layout)
    with _divided_memory(model, state, at_least=given["x_in"].shape[0]):
        return executor(*args, **kwargs)


def _layout(state: ParallelRun, given: dict[str, Any]) -> Layout | None:
    """The layout of an evaluation's calls; with cfg 2: that both prompts are to run at once.

    Prompts that ComfyUI puts into one call are rows of it, which need no second branch.
    """
    conds, num_rows = given["conds"], given["x_in"].shape[0]
    assert state.shared is not None
    if not can_route(conds) or "cache" in state.shared.techniques:
        return state.choose(num_rows)
    merged = state.choose(2 * num_rows)
    may_merge = state.config.cfg != 2 and merged is not None and merged.batch > 1
    if may_merge and worker_host.come_together(conds, given["x_in"], given["timestep"]):
        return merged
    return state.choose(num_rows, 2)


def _routed(state: ParallelRun, executor: Any, given: dict[str, Any], layout: Layout) -> Any:
    """Two conditionings at once, on two branches; one after the other where that fails."""
    model, conds, model_options = given["model"], given["conds"], given["model_options"]
    assert state.shared is not None

    def branch(number: int) -> Any:
        own = [cond if i == number else None for i, cond in enumerate(conds)]
        options = model_options["transformer_options"]
        marked = {**model_options, "transformer_options": {**options, BRANCH: number}}
        return executor(model, own, given["x_in"], given["timestep"], marked)[number]

    baton = Baton()
    state.pair = (layout, baton)
    try:
        with state.recovered(), _divided_memory(model, state):
            return list(
                run_both(
                    baton,
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
        state.pair = None
    return executor(model, conds, given["x_in"], given["timestep"], model_options)


def prepare_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: workers load while this process does, and it needs its part only.

    Activations are divided by the ranks, so that ComfyUI keeps as much of the weights here as the
    workers do there, and leaves a batch in one call that no single device had room for.
    """
    names = ("model", "noise_shape", "conds", "model_options")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    state = _state((given["model_options"] or {}).get("transformer_options"))
    if state is None or state.shared is None:
        return executor(*args, **kwargs)
    state.begin_workers(given["noise_shape"])
    with _divided_memory(given["model"].model, state, plus=state.groups_bytes):
        return executor(*args, **kwargs)


@contextmanager
def _divided_memory(
    model: Any, state: ParallelRun, *, at_least: int = 0, plus: int = 0
) -> Iterator[None]:
    """Have `model` (a BaseModel) say what a call needs of this rank's memory, for a while.

    at_least: rows that no call has less of. A larger one that is shared by so many lanes that this
    rank has no more to do than in that one needs nothing more. plus: bytes beside the call.
    """
    whole = model.memory_required

    def own_rows(num_rows: int) -> float:
        return num_rows * state.share_of(num_rows)

    def memory_required(input_shape: Any, *args: Any, **kwargs: Any) -> Any:
        num_rows = input_shape[0]
        is_free = num_rows > at_least > 0 and own_rows(num_rows) <= own_rows(at_least)
        if is_free and state.counts.shared and not state.counts.local:
            return 0
        is_alone = state.counts.local > state.counts.shared  # whatever the layout says
        share = 1.0 if is_alone else state.share_of(num_rows)
        return whole(input_shape, *args, **kwargs) * share + plus

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
