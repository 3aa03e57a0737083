"""The blocks that offload streams, in the order they run, and hooks that exist for one model call.

A unit is one module that the host calls: a block, or a child of one where the host walks the
children itself. A hook is an instance-level `forward` that calls the one it found, so a cache that
puts its own above it can skip a block without running the hook.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures import Architecture, stack_blocks
from ..architectures.data import called_modules

Around = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Unit:
    """One called module. block: index over all stacks in execution order, as ModelCall counts."""

    block: int
    name: str
    module: torch.nn.Module


def units_of(network: torch.nn.Module, architecture: Architecture | None) -> list[Unit]:
    """All units of a network in the order they run; empty without an Architecture."""
    units: list[Unit] = []
    block_index = 0
    for stack in architecture.stacks if architecture is not None else ():
        for index, block in enumerate(stack_blocks(network, stack)):
            units.extend(
                Unit(block_index, f"{stack.block_type}/{index}", module)
                for module in called_modules(block, stack)
            )
            block_index += 1
    return units


@contextmanager
def hooks(units: Sequence[Unit], around: Around) -> Iterator[None]:
    """Run every unit's forward inside `around(position)`; what was there before comes back."""
    installed: list[tuple[torch.nn.Module, Any]] = []
    seen: set[int] = set()
    try:
        for position, unit in enumerate(units):
            if id(unit.module) in seen:  # one module in two places of a stack
                continue
            seen.add(id(unit.module))
            fields = unit.module.__dict__
            installed.append((unit.module, fields.get("forward")))
            fields["forward"] = _inside(unit.module.forward, around, position)
        yield
    finally:
        for module, found in reversed(installed):
            if found is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = found


def _inside(forward: Callable[..., Any], around: Around, position: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        with around(position):
            return forward(*args, **kwargs)

    return hooked


def weights_of(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """(owner, name, parameter) of every weight in a module, but those not made yet (meta)."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                yield owner, name, parameter


def parts_of(weight: torch.Tensor) -> tuple[list[tuple[str, torch.Tensor]], Any]:
    """The plain tensors of a weight, and the context that makes a quantized one of them again.

    Follows torch's protocol of tensor subclasses; a plain weight is its own single part.
    """
    if hasattr(weight, "__tensor_flatten__"):
        names, context = weight.__tensor_flatten__()
        return [(name, getattr(weight, name)) for name in names], context
    return [("", weight.detach())], None


def module_sizes(module: torch.nn.Module) -> tuple[int, ...]:
    """Bytes of weights of each submodule that has some."""
    sizes: dict[int, int] = {}
    for owner, _, parameter in weights_of(module):
        size = sum(part.nbytes for _, part in parts_of(parameter)[0])
        sizes[id(owner)] = sizes.get(id(owner), 0) + size
    return tuple(sizes.values())
