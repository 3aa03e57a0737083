"""The "Comfy Compiler" of newer cores (0.35 and later): what stays out of it, and runs without it.

comfy/model_prefetch.py records the memory of a network's blocks and gives the same addresses out
at the next call. What it cannot stand is told in tests/next_core.py. Its functions are looked up
in the modules that ComfyUI has loaded: without ComfyUI, or on an older one, nothing happens here.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

_thread = threading.local()  # .unrecorded: this thread is inside unrecorded()


def unrecorded() -> AbstractContextManager[None]:
    """Keeps what is allocated inside out of the record that ComfyUI replays for each block.

    Newer cores (comfy/model_prefetch.py, 0.35 and later) record a block's allocations and give
    them the same addresses at the next call: a tensor that outlives its block is overwritten, or
    ends the process. Around every tensor that is kept across blocks or calls, every exchange and
    every allocation that differs from call to call; never around a block or a model call, whose
    own allocations belong into the record. What was made outside may not lose its last reference
    inside: CUDA would be asked to free an address that it does not know, and the process aborts.
    Does nothing on a core that records nothing.
    """
    if torch.compiler.is_compiling():  # a graph's own allocations happen when it runs
        return nullcontext()
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    # Core's pause is a flag, not a count: an inner one would end the outer one early.
    if pause is None or getattr(_thread, "unrecorded", False):
        return nullcontext()
    return _paused(pause)


@contextmanager
def _paused(pause: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    _thread.unrecorded = True
    try:
        with pause():
            yield
    finally:
        _thread.unrecorded = False


@dataclass
class _CompilerSwitch:
    """Runs that hold the compiler off, and what was set before the first of them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_runs: int = 0
    before: bool = False


_switch = _CompilerSwitch()


@contextmanager
def turned_off(device: torch.device) -> Iterator[bool]:
    """ComfyUI's compiler (0.35 and later) off by its own switch, which core reads in every call.

    Yields whether that changes anything on `device`. Runs may overlap: the last one restores.
    """
    args: Any = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    if not hasattr(args, "disable_comfy_compiler"):
        yield False
        return
    is_on = getattr(sys.modules.get("comfy.model_prefetch"), "malloc_graph_enabled", None)
    with _switch.lock:
        matters = is_on is not None and bool(is_on(device))
        if _switch.num_runs == 0:
            _switch.before = args.disable_comfy_compiler
        _switch.num_runs += 1
        args.disable_comfy_compiler = True
    try:
        yield matters
    finally:
        with _switch.lock:
            _switch.num_runs -= 1
            if _switch.num_runs == 0:
                args.disable_comfy_compiler = _switch.before


def prefix_cache_off(network: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Turn Qwen-Image 2.1's own cache off in a run's transformer_options; whether there was one.

    It leaves text and reference rows out of every call behind the first (core 0.37 and later), and
    does not see forwards of ours: block caches and token plans need a sequence of one length.
    """
    names = {cls.__name__ for cls in type(network).__mro__}
    if "QwenImage21Transformer2DModel" not in names:
        return False
    chosen = options.get("qwen_image21_cache") or {}
    options["qwen_image21_cache"] = {**chosen, "device": "off"}
    return chosen.get("device") != "off"


@contextmanager
def undisturbed(
    keepers: Sequence[str],
    network: torch.nn.Module,
    options: dict[str, Any],
    device: torch.device,
    note: Callable[[str], None],
) -> Iterator[None]:
    """A run in which `keepers`, techniques, keep tensors of the network's forward.

    Pausing the compiler is not enough for them: a reused call gives a block's input back in
    another block's scope. options: transformer_options of the run.
    """
    if not keepers:
        yield
        return
    if prefix_cache_off(network, options):
        note(f"Qwen-Image 2.1's own cache is off for this run, because of {keepers[0]}")
    with turned_off(device) as was_on:
        if was_on:
            keep = f"{' and '.join(keepers)} {'keeps' if len(keepers) == 1 else 'keep'}"
            note(f"ComfyUI's compiler is off for this run: {keep} tensors across blocks")
        yield
