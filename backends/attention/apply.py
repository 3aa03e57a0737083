"""apply_attention(model, config): the technique on a clone of a MODEL."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import host
from ..calls import CALL, call_options, with_options
from ..run import Run, attach, current
from . import op
from .config import AttentionConfig, AttentionError
from .defaults import Attention
from .dispatch import AttentionRun
from .kernels.base import Kernel
from .kernels.table import KERNELS, POLICIES
from .override import BOUND, Override

NAME = "attention"
KEY = "slipstream.attention"
OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class AttentionTechnique:
    """Attention as attached to a MODEL. kernels and policies: the table, or a test's own."""

    config: AttentionConfig
    previous: Attention | None = None
    kernels: Mapping[str, Kernel] = field(default_factory=lambda: KERNELS)
    policies: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: POLICIES)
    name: str = NAME

    def start(self, run: Run) -> AttentionRun:
        return AttentionRun(run, self.config, self.kernels, self.policies, self.previous)


def apply_attention(
    model: Any,
    config: AttentionConfig,
    *,
    kernels: Mapping[str, Kernel] | None = None,
    policies: Mapping[str, tuple[str, ...]] | None = None,
) -> Any:
    """A clone of `model` whose attention calls go to the kernels that `config` allows.

    The override found on `model` stays in the chain; an earlier application of ours is replaced.
    Raises AttentionError if policy manual names a kernel that is not installed.
    """
    table = KERNELS if kernels is None else kernels
    if config.policy == "manual":
        reason = table[config.backend].available()
        if reason is not None:
            raise AttentionError(f"Backend '{config.backend}' is not available: {reason}")
    op.register()
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    if isinstance(previous, Override):
        previous = previous.previous
    options[OVERRIDE] = Override(previous)
    technique = AttentionTechnique(
        config, previous, table, POLICIES if policies is None else policies
    )
    attach(patched, technique)
    for kind, wrapper in (("apply_model", bind_call), ("predict_noise", check_evaluation)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def check_evaluation(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """PREDICT_NOISE wrapper: an evaluation that a kernel has made NaN is computed again."""
    state = _state(executor.class_obj.model_options.get("transformer_options"))
    if state is None:
        return executor(*args, **kwargs)
    return state.evaluate(lambda: executor(*args, **kwargs))


def bind_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: this Run's dispatcher answers for one model call, then nobody does."""
    options = call_options(args, kwargs)
    state = _state(options)
    if options is None or state is None:
        return executor(*args, **kwargs)
    call = state.bind(options[CALL], options)
    if not isinstance(options.get(OVERRIDE), Override):
        state.displaced_by = host.qualified_name(options.get(OVERRIDE))
    x = kwargs["x"] if "x" in kwargs else args[0]
    new_args, new_kwargs = with_options(args, kwargs, {**options, BOUND: call})
    network = executor.class_obj.diffusion_model
    with op.bound(x.device, call), state.places.noted(network, call):
        return executor(*new_args, **new_kwargs)


def _state(options: dict[str, Any] | None) -> AttentionRun | None:
    run = current(options)
    state = run.states.get(NAME) if run is not None else None
    return state if isinstance(state, AttentionRun) else None
