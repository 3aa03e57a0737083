"""Which block an attention call comes from.

ComfyUI's models put the block's type and index into transformer_options, or only the index, or
nothing. For the last two the architecture names the block: while a model call runs, each block
that it lists notes itself on the call. Counting calls instead would name another block as soon as
a cache skips some.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from .. import architectures
from ..architectures import Architecture, called_modules, stack_blocks
from ..forwards import forward_slot, overridden
from .policy import BlockNumbers

T = TypeVar("T")
Place = tuple[str, int]  # (block type, index)
NO_PLACE: Place = ("call", 0)  # of a call outside of all blocks, and without a known architecture


class Named(Protocol):
    """A model call that remembers which block runs."""

    place: Place | None


def place_in(options: dict[str, Any], place: Place | None) -> Place:
    """The block of a call: `place` if we noted one, else of ComfyUI's ids if they are whole.

    VACE's side blocks run with the ids of the main block before them.
    """
    if place is not None:
        return place
    unet_block = options.get("block")
    index = options.get("block_index")
    if unet_block is not None and index is not None:
        return f"{unet_block[0]}{unet_block[1]}", index
    block_type = options.get("block_type")
    if block_type is not None and index is not None:
        return block_type, index
    return NO_PLACE if index is None else ("block", index)


class Places:
    """The blocks of one network that have to be noted while it runs.

    is_compiled: torch.compile has traced the blocks; noting would make it trace them again.
    """

    def __init__(self, network: torch.nn.Module, *, is_compiled: bool):
        self._architecture = None if is_compiled else architectures.find(network)

    @contextmanager
    def noted(self, network: torch.nn.Module, call: Named) -> Iterator[None]:
        """Within this, `call.place` is the block that runs."""
        if self._architecture is None:
            yield
            return
        with overridden(
            [
                (module, partial(_noting, call, place, getattr(module, forward_slot(module))))
                for place, module in _modules(network, self._architecture)
            ]
        ):
            yield


def _noting(
    call: Named, place: Place, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    before, call.place = call.place, place
    try:
        return forward(*args, **kwargs)
    finally:
        call.place = before


def _modules(
    network: torch.nn.Module, architecture: Architecture
) -> Iterator[tuple[Place, torch.nn.Module]]:
    """The modules that ComfyUI calls for blocks which it does not name itself."""
    notes = architecture.notes
    is_named = notes.unet or (notes.block_ids and notes.block_types)
    main = () if is_named else architecture.stacks
    for stack in (*main, *architecture.side):
        for index, block in enumerate(stack_blocks(network, stack)):
            for module in called_modules(block, stack):
                yield (stack.block_type, index), module


def by_place(network: torch.nn.Module, found: Mapping[torch.nn.Module, T]) -> dict[Place, T]:
    """What `found` says of modules inside blocks, by block; blocks with two opinions are left out.

    found: e.g. the attention that a checkpoint prefers, by ComfyUI's module that holds it.
    """
    architecture = architectures.find(network)
    if architecture is None or not found:
        return {}
    places: dict[Place, T] = {}
    for stack in (*architecture.stacks, *architecture.side):
        for index, block in enumerate(stack_blocks(network, stack)):
            said = {found[module] for module in block.modules() if module in found}
            if len(said) == 1:
                places[stack.block_type, index] = said.pop()
    return places


def block_numbers(network: torch.nn.Module) -> BlockNumbers:
    """Where each block type starts when the blocks of all stacks are counted."""
    architecture = architectures.find(network)
    if architecture is None or architecture.notes.unet:
        return BlockNumbers({})
    starts: dict[str, int] = {}
    number = 0
    for stack in architecture.stacks:
        starts.setdefault(stack.block_type, number)
        number += len(stack_blocks(network, stack))
    return BlockNumbers(starts)


def num_blocks(network: torch.nn.Module) -> int:
    """Blocks of all stacks; 0 for a network that is not known."""
    architecture = architectures.find(network)
    if architecture is None:
        return 0
    return sum(len(stack_blocks(network, stack)) for stack in architecture.stacks)
