"""A sampling run on a worker: rank 0's run and call, rebuilt from facts, with the same techniques.

Workers do not sample. For every model call they get the facts of rank 0's call and run the
network inside the wrappers of the techniques that travelled, as rank 0 does inside ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..backends.calls import CALL, RUN, BranchKey, ModelCall
from ..backends.run import WRAPPER_ORDER, Run
from .network_call import NetworkCall

NAME = "parallel"
KEY = "slipstream.parallel"
Decide = Callable[[ModelCall, bool], bool]


@dataclass(frozen=True)
class RunFacts:
    """What a worker must know about rank 0's run. JSON values only.

    memory_bytes: what a call needs beside the weights; techniques: name -> fields of its config,
    for those that work inside a call.
    """

    id: int
    sigmas: tuple[float, ...]
    memory_bytes: int
    techniques: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class CallFacts:
    """What a worker must know about rank 0's call. JSON values and UUIDs only.

    run: its id; decisions: what a block cache has decided for the call already.
    """

    run: int
    index: int
    step: int
    evaluation: int
    sigma: float
    uuids: tuple[Any, ...]
    occurrence: int
    window: tuple[int, ...] | None
    cond_or_uncond: tuple[int, ...]
    decisions: tuple[bool, ...] = ()

    @staticmethod
    def of(run: Run, call: ModelCall, *, decisions: Sequence[bool] = ()) -> "CallFacts":
        return CallFacts(
            run=run.id,
            index=call.index,
            step=call.step,
            evaluation=call.evaluation,
            sigma=run.sigma,
            uuids=call.key.uuids,
            occurrence=call.key.occurrence,
            window=call.key.window,
            cond_or_uncond=call.cond_or_uncond,
            decisions=tuple(decisions),
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def call(self) -> ModelCall:
        """Rank 0's ModelCall."""
        return ModelCall(
            index=self.index,
            step=self.step,
            evaluation=self.evaluation,
            key=BranchKey(self.uuids, self.occurrence, self.window),
            cond_or_uncond=self.cond_or_uncond,
        )


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a technique's frozen config."""
    return asdict(config)


class WorkerRun:
    """One run on a worker: `patcher` carries the techniques; states live until `close`."""

    def __init__(self, patcher: Any, facts: RunFacts, techniques: dict[str, Any]):
        self.id, self.patcher = facts.id, patcher
        self._run = Run(patcher, torch.tensor(facts.sigmas), techniques)
        self._run.start()

    def call(
        self,
        facts: CallFacts,
        network: torch.nn.Module,
        call: NetworkCall,
        forward: Callable[..., Any],
    ) -> Any:
        """`forward` as `call` says, inside the techniques' wrappers."""
        run = self._run
        run.step, run.evaluation, run.sigma = facts.step, facts.evaluation, facts.sigma
        own = self.patcher.model_options["transformer_options"]
        options = {**call.options, **own, RUN: run, CALL: facts.call()}
        around_network = Chain(self._wrappers("diffusion_model"), forward, network)

        def around_model(*_: Any, transformer_options: dict[str, Any], **__: Any) -> Any:
            return call.with_(options=transformer_options).run(around_network)

        chain = Chain(self._wrappers("apply_model"), around_model, self.patcher.model)
        x = next(iter(_tensors(list(call.arguments.values()))))
        return chain(x, transformer_options=options)

    def _wrappers(self, kind: str) -> list[Callable[..., Any]]:
        """Our techniques' wrappers, outermost first, as backends.run orders them on rank 0."""
        keys = [key for key in WRAPPER_ORDER if key != KEY]
        return [wrapper for key in keys for wrapper in self.patcher.get_wrappers(kind, key)]

    def close(self) -> None:
        self._run.close()


class Chain:
    """What ComfyUI's WrapperExecutor is to a wrapper: call it to go on."""

    def __init__(
        self, wrappers: Sequence[Callable[..., Any]], original: Callable[..., Any], owner: Any
    ):
        self._wrappers, self.original, self.class_obj = wrappers, original, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self._wrappers
        return first(Chain(rest, self.original, self.class_obj), *args, **kwargs)


def _tensors(values: Any) -> list[torch.Tensor]:
    if torch.is_tensor(values):
        return [values]
    if isinstance(values, (list, tuple)):
        return [t for value in values for t in _tensors(value)]
    return []
