"""Watches one real model call of ComfyUI through hooks on the blocks.

`record` samples one step of a tiny model and keeps, for every call of every block of a file's
stacks, clones of its tensor arguments and results, and the attention calls within.
"""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import tiny
import torch
from slipstream.backends.architectures import (
    Architecture,
    Stack,
    called_modules,
    stack_blocks,
    whole_sequence,
)
from torch.overrides import TorchFunctionMode


@dataclass
class Visit:
    """One call of one block (of one child, for stacks whose children are called)."""

    path: str  # of the stack
    index: int  # of the block in its stack
    child: int
    is_last: bool  # of its stack
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    wrote_input: bool = False
    options: list[dict[str, Any]] = field(default_factory=list)  # one per override call
    num_sdpa: int = 0


@dataclass
class Recording:
    """What one model call did."""

    network: torch.nn.Module
    visits: list[Visit] = field(default_factory=list)
    num_override: int = 0
    num_wrapper: int = 0
    num_prefetch_queues: int = 0

    def of(self, stack: Stack) -> list[Visit]:
        return [visit for visit in self.visits if visit.path == stack.blocks]


class _CountSDPA(TorchFunctionMode):
    def __init__(self, recorder: "_Recorder"):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and self.recorder.open:
            self.recorder.open[-1].num_sdpa += 1
        return func(*args, **(kwargs or {}))


class _Recorder:
    """Hooks on the blocks, an attention override and a DIFFUSION_MODEL wrapper, for one run."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.open: list[Visit] = []
        self.handles: list[Any] = []

    def hook(self, stack: Stack) -> None:
        blocks = stack_blocks(self.recording.network, stack)
        for index, block in enumerate(blocks):
            for child, module in enumerate(called_modules(block, stack)):
                self._hook_module(module, (stack.blocks, index, child, index == len(blocks) - 1))

    def _hook_module(self, module: torch.nn.Module, place: tuple[str, int, int, bool]) -> None:
        def before(module, args, kwargs):
            self.open.append(Visit(*place, module, _clone(args), _clone(kwargs)))

        def after(module, args, kwargs, result):
            visit = self.open.pop()
            visit.result = _clone(result)
            visit.wrote_input = not _same((visit.args, visit.kwargs), (args, kwargs))
            self.recording.visits.append(visit)

        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def override(self, func, *args, **kwargs):
        self.recording.num_override += 1
        if self.open:
            self.open[-1].options.append(dict(kwargs["transformer_options"]))
        return func(*args, **kwargs)

    def wrapper(self, executor, *args, **kwargs):
        self.recording.num_wrapper += 1
        return executor(*args, **kwargs)


def record(
    patcher: Any, family: str, architecture: Architecture, positive: Any = None
) -> Recording:
    """One step of a tiny model at cfg 1, that is one model call, over the whole sequence.

    The patcher stays as it is.
    """
    import comfy.model_prefetch

    patcher = patcher.clone()
    recording = Recording(patcher.model.diffusion_model)
    recorder = _Recorder(recording)
    ours = {"optimized_attention_override": recorder.override}
    options = {**patcher.model_options["transformer_options"], **ours}
    patcher.model_options["transformer_options"] = whole_sequence(architecture, options)
    patcher.add_wrapper_with_key("diffusion_model", "guard", recorder.wrapper)
    queue = comfy.model_prefetch.make_prefetch_queue
    try:
        for stack in (*architecture.stacks, *architecture.side):
            recorder.hook(stack)
        with (
            mock.patch.object(comfy.model_prefetch, "make_prefetch_queue", wraps=queue) as queues,
            _CountSDPA(recorder),
        ):
            tiny.sample(patcher, family, steps=1, cfg=1.0, positive=positive)
        recording.num_prefetch_queues = queues.call_count
    finally:
        for handle in recorder.handles:
            handle.remove()
    return recording


def _clone(value: Any) -> Any:
    """Tensors cloned, in tuples, lists and dicts; transformer_options left out."""
    if torch.is_tensor(value):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_clone(v) for v in value)
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items() if k != "transformer_options"}
    return value


def _same(old: Any, new: Any) -> bool:
    if torch.is_tensor(old):
        return torch.equal(old, new)
    if type(old) in (tuple, list):
        return all(map(_same, old, new))
    if isinstance(old, dict):
        return all(_same(value, new[key]) for key, value in old.items())
    return True
