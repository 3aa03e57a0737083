"""What newer cores do and 0.33 does not, in the test process only: 0.35's record of the memory of
blocks (the "Comfy Compiler") and 0.40's attention calls.

Written from the behaviour of comfy/model_prefetch.py and comfy/ldm/modules/attention.py of
ComfyUI 0.40 and of the allocator of comfy-aimdo 0.6. The allocator records what is allocated
between `malloc_graph_begin` and `malloc_graph_end`, per block scope, and hands out the same
addresses at the next call. What it cannot stand, and what happens then:

- kept: a tensor of a scope lives when the scope ends. It is severed from the record: a page of
  VRAM is lost for it, the next calls differ, and the graph breaks;
- late: such a tensor is freed before the whole call has ended: "aimdo memory compile error";
- foreign: a tensor is freed in another scope than its own: the same error;
- paused: a recorded tensor is freed while the record is paused: the free reaches CUDA with an
  address that CUDA does not know, and the process aborts.

`pause_malloc_graph` is a flag, not a count. A core model that is not written for the compiler
(0.33's Flux, say) does some of this by itself: tests compare with the model alone.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import comfy_home
import torch
from slipstream.backends.architectures import find, stack_blocks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

KEPT, LATE, FOREIGN, PAUSED = "kept", "late", "foreign", "paused"
# The first module behind the blocks: core's loop ends its last scope in front of it.
TAILS = {
    "MiniMaxH3Model": "final_layer",
    "QwenImageTransformer2DModel": "norm_out",
    "Flux": "final_layer",
    "WanModel": "head",
}
ERROR = "aimdo memory compile error"


@dataclass(frozen=True)
class Offence:
    """One thing that the allocator cannot stand. scope: number of the block, -1 around blocks."""

    kind: str
    scope: int
    nbytes: int


@dataclass
class _Scope:
    number: int
    alive: dict[int, "_Block"] = field(default_factory=dict)


@dataclass
class _Block:
    """A recorded allocation: its storage, where it was made, and the scope that owns it."""

    storage: StorageWeakRef
    nbytes: int
    scope: _Scope
    made_at: str


class Recorder:
    """The record of one thread, under every call that runs inside `recording`.

    offences: per call of the network; where: offence -> file and line that allocated.
    """

    def __init__(self) -> None:
        self.calls: list[Counter[Offence]] = []
        self.where: dict[Offence, Counter[str]] = {}
        self.num_begun = self.num_scopes = self.num_paused = 0
        self._stack: list[_Scope] = []
        self._severed: dict[int, _Block] = {}  # of ended scopes, until the call ends
        self._is_paused = False
        self._scopes_of_call = 0

    @property
    def is_active(self) -> bool:
        return bool(self._stack)

    # --- what comfy-aimdo's graph does

    def begin(self) -> None:
        if self.is_active:
            raise RuntimeError(f"{ERROR}: begun twice")
        self.num_begun += 1
        self._scopes_of_call = 0
        self._is_paused = False
        self.calls.append(Counter())
        self._stack.append(_Scope(-1))

    def iterate(self, name: str | None) -> None:
        """The scope of the block before ends; the one of the next begins, if there is a name."""
        self.look()
        if len(self._stack) > 1:
            self._leave()
        if name is not None:
            self.num_scopes += 1
            self._stack.append(_Scope(self._scopes_of_call))
            self._scopes_of_call += 1

    def end(self) -> None:
        self.look()
        while self._stack:
            self._leave()
        self._severed.clear()

    def pause(self, paused: bool) -> None:
        self.look()
        self.num_paused += paused
        self._is_paused = paused

    def _leave(self) -> None:
        scope = self._stack.pop()
        for block in scope.alive.values():
            self._note(KEPT, block)
        if self._stack:
            self._severed.update(scope.alive)

    # --- what the hooked allocator sees

    def allocated(self, storage: torch.UntypedStorage) -> None:
        if not self.is_active or self._is_paused or not storage.nbytes():
            return
        scope = self._stack[-1]
        block = _Block(StorageWeakRef(storage), storage.nbytes(), scope, _made_at())
        scope.alive[block.storage.cdata] = block

    def look(self) -> None:
        """Find what was freed since the record was last in another state."""
        for scope in self._stack:
            for key in [k for k, block in scope.alive.items() if block.storage.expired()]:
                block = scope.alive.pop(key)
                if self._is_paused:
                    self._note(PAUSED, block)
                elif scope is not self._stack[-1]:
                    self._note(FOREIGN, block)
        for key in [k for k, block in self._severed.items() if block.storage.expired()]:
            self._note(LATE, self._severed.pop(key))

    def _note(self, kind: str, block: _Block) -> None:
        offence = Offence(kind, block.scope.number, block.nbytes)
        self.calls[-1][offence] += 1
        self.where.setdefault(offence, Counter())[block.made_at] += 1

    def beyond(
        self, plain: "Recorder", kinds: tuple[str, ...], *, by_size: bool = True
    ) -> list[str]:
        """Offences that no call of the model alone commits as often, as sentences.

        by_size False: for calls on other shapes than the model alone had.
        """

        def counted(call: Counter[Offence]) -> Counter[Offence]:
            found: Counter[Offence] = Counter()
            for one, count in call.items():
                found[one if by_size else replace(one, nbytes=0)] += count
            return found

        allowed: Counter[Offence] = Counter()
        for call in plain.calls:
            allowed |= counted(call)
        found = []
        for number, call in enumerate(self.calls):
            for offence, count in (counted(call) - allowed).items():
                if offence.kind in kinds:
                    places = [
                        p for one in call for p in self.where[one] if one.kind == offence.kind
                    ]
                    found.append(f"call {number}: {count} x {offence}, made at one of {places}")
        return found


def _made_at() -> str:
    """File and line of the innermost frame that is neither torch's nor this file."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path:
            return f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Allocations(TorchDispatchMode):
    """Tells the recorder of every storage that an operator makes."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._recorder.is_active:
            given = {
                t.untyped_storage()._cdata for t in _tensors([*args, *(kwargs or {}).values()])
            }
            for tensor in _tensors([out]):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._recorder.allocated(storage)
        return out


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class NextCore:
    """Newer functions in 0.33's modules, undone by `monkeypatch`.

    obeys: whether the record stops for `disable_comfy_compiler`, as core's does.
    """

    def __init__(self, monkeypatch: Any):
        comfy_home.in_process()
        import comfy.cli_args
        import comfy.model_prefetch

        self._patch = monkeypatch
        self.args, self.prefetch = comfy.cli_args.args, comfy.model_prefetch
        self.recorder = Recorder()
        self.obeys = True
        self.seen_switch: list[bool] = []  # disable_comfy_compiler at every call of a network
        monkeypatch.setattr(self.args, "disable_comfy_compiler", False, raising=False)
        for name in (
            "malloc_graph_enabled", "malloc_graph_begin", "malloc_graph_end",
            "pause_malloc_graph", "prefetch_queue_pop",
        ):  # fmt: skip
            monkeypatch.setattr(self.prefetch, name, getattr(self, name), raising=False)

    # --- comfy.model_prefetch

    def malloc_graph_enabled(self, device: Any) -> bool:
        """On every device: there, aimdo and CUDA are needed too."""
        return not (self.obeys and self.args.disable_comfy_compiler)

    def malloc_graph_begin(self, device: Any) -> None:
        if self.malloc_graph_enabled(device):
            self.recorder.begin()

    def malloc_graph_end(self) -> None:
        if self.recorder.is_active:
            self.recorder.end()

    @contextmanager
    def pause_malloc_graph(self, sync: bool = False) -> Iterator[None]:
        if self.recorder.is_active:
            self.recorder.pause(True)
        try:
            yield
        finally:
            if self.recorder.is_active:
                self.recorder.pause(False)

    def prefetch_queue_pop(
        self, queue: Any, device: Any, module: Any, *_: Any, malloc_scope: str = "block", **__: Any
    ) -> None:
        """0.33's H3 calls it in front of every block, without the scope's name."""
        assert queue is None, "no prefetch queue on a CPU"
        self._iterate(malloc_scope if module is not None else None)

    # --- a network as newer cores have it

    def compile(self, network: torch.nn.Module) -> None:
        """Begin and end around the network's forward, a scope for each of its blocks."""
        cls, architecture = type(network), find(network)
        assert architecture is not None
        self._patch.setattr(cls, "forward", self._recorded(cls.forward))
        tail = getattr(network, TAILS[cls.__name__])
        tail.register_forward_pre_hook(lambda *_: self._iterate(None))
        if cls.__name__ == "MiniMaxH3Model":  # its own loop calls prefetch_queue_pop
            return
        for stack in architecture.stacks:
            for block in stack_blocks(network, stack):
                block.register_forward_pre_hook(lambda *_: self._iterate("block"))

    def _iterate(self, name: str | None) -> None:
        if self.recorder.is_active:
            self.recorder.iterate(name)

    def _recorded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def recorded(network: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen_switch.append(self.args.disable_comfy_compiler)
            x = args[0] if args else kwargs["x"]
            latents = x if isinstance(x, (list, tuple)) else [x]
            if not self.malloc_graph_enabled(latents[0].device):
                return forward(network, *args, **kwargs)
            out = [torch.empty_like(one) for one in latents]
            self.malloc_graph_begin(latents[0].device)
            made = forward(network, *args, **kwargs)
            for place, one in zip(out, made if x is latents else [made], strict=True):
                place.copy_(one)
            del made, one
            self.malloc_graph_end()
            return out if x is latents else out[0]

        return recorded

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """A fresh recorder for the runs inside."""
        self.recorder = Recorder()
        self.seen_switch = []
        with _Allocations(self.recorder):
            yield self.recorder


class Preferred:
    """The `comfy_attention` of a checkpoint's layer that asks for an attention of its own."""

    def __init__(self, function: Callable[..., torch.Tensor] | None = None):
        self.function = function


def use_newest_attention(monkeypatch: Any, preferred: Preferred | None = None) -> Counter[str]:
    """ComfyUI 0.40's way of calling attention, in every network: q, k and v come in containers, and
    `preferred` is popped before an override sees the call. Returns counts by who answered.
    """
    from comfy.ldm.modules import attention

    answered: Counter[str] = Counter()
    old = attention.optimized_attention
    call = _newest_wrapper(old.__wrapped__, attention.AttentionTensorContainer, answered)

    @wraps(call)
    def from_network(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], torch.Tensor) and "_inside_attn_wrapper" not in kwargs:
            boxes = [attention.AttentionTensorContainer(t) for t in args[:3]]
            return call(*boxes, *args[3:], preferred_attention=preferred, **kwargs)
        return call(*args, **kwargs)

    from_network.container_function = None
    for name, module in list(sys.modules.items()):
        if name.startswith("comfy."):
            for attribute in [a for a, value in vars(module).items() if value is old]:
                monkeypatch.setattr(module, attribute, from_network)
    return answered


def _newest_wrapper(
    func: Callable[..., Any], container: type, answered: Counter[str]
) -> Callable[..., Any]:
    """What 0.40's wrap_attn makes of an attention function."""

    @wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        preferred = kwargs.pop("preferred_attention", None)
        boxes = args[:3] if isinstance(args[0], container) else None
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            options = kwargs.get("transformer_options")
            if options is not None and "optimized_attention_override" in options:
                override = options["optimized_attention_override"]
                if boxes is not None and hasattr(override, "container_function"):
                    answered["container_function"] += 1
                    return override.container_function(*args, **kwargs)
                answered["override"] += 1
                if boxes is not None:
                    args = (*(box.take() for box in boxes), *args[3:])
                return override(func, *args, **kwargs)
            if preferred is not None and preferred.function is not None:
                answered["preferred"] += 1
                return preferred.function(*args, **kwargs)
        if boxes is not None:
            args = (*(box.take() for box in boxes), *args[3:])
        answered["core"] += 1
        return func(*args, **kwargs)

    return wrapper
