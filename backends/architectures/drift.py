"""What an architecture file claims and a live network does not show, as sentences.

`drift` needs no forward pass: it looks at attributes and signatures. The guard in
tests/architecture_guard.py goes on from there and watches one real model call.
"""

import inspect
from collections.abc import Iterator

import torch

from .binding import positions
from .data import JOIN_SKIP, Architecture, Stack, called_modules, stack_blocks


def drift(architecture: Architecture, network: torch.nn.Module) -> list[str]:
    """All differences between the data and the live network; empty if every claim holds."""
    name = architecture.class_name
    if name not in (cls.__name__ for cls in type(network).__mro__):
        return [f"{name} is not a class of {type(network).__name__}"]
    found = [f"{name}: {sentence}" for sentence in inconsistencies(architecture)]
    listed: list[torch.nn.Module] = []
    for stack in (*architecture.stacks, *architecture.side):
        try:
            blocks = stack_blocks(network, stack)
        except AttributeError:
            found.append(f"{name} has no '{stack.blocks}'")
            continue
        listed.extend(blocks)
        found.extend(f"{name}.{stack.blocks}: {s}" for s in _signature_drift(stack, blocks))
        through = architecture.notes.options_through
        if blocks and _should_take_options(architecture, stack) and not takes(blocks[0], through):
            found.append(f"{name}.{stack.blocks}: forward takes no {through}")
    if architecture.stacks:
        found.extend(
            f"{name}: '{path}' has attention and is in no stack"
            for path in _unlisted(network, listed)
        )
    return found


def inconsistencies(architecture: Architecture) -> Iterator[str]:
    """Contradictions within the data itself, no network needed."""
    previous: Stack | None = None
    for stack in architecture.stacks:
        yield from _carry_inconsistencies(stack)
        if stack.joins and stack.joins != JOIN_SKIP:
            before = set(previous.carry.streams) if previous else set()
            if set(stack.joins.split(",")) != before:
                yield f"{stack.blocks} joins '{stack.joins}', but before it run {sorted(before)}"
        previous = stack
    for stack in architecture.side:
        yield from _carry_inconsistencies(stack)
        if stack.joins:
            yield f"{stack.blocks} is a side stack, which joins nothing"
    types = [stack.block_type for stack in (*architecture.stacks, *architecture.side)]
    if len(set(types)) != len(types):
        yield f"two stacks share a block_type ({', '.join(types)})"


def takes(block: torch.nn.Module, name: str) -> bool:
    """Whether the block's forward accepts an argument of this name."""
    parameters = inspect.signature(type(block).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _should_take_options(architecture: Architecture, stack: Stack) -> bool:
    return bool(stack.attention_calls) and architecture.notes.reaches_override


def _carry_inconsistencies(stack: Stack) -> Iterator[str]:
    carry = stack.carry
    num_args = 1 if carry.packed else len(carry.streams)
    if len(carry.args) != num_args:
        yield f"{stack.blocks}: {len(carry.args)} args for {len(carry.streams)} streams"
    if not set(carry.streams) <= set(carry.returns):
        yield f"{stack.blocks}: a stream is not among the returns {carry.returns}"
    if not set(carry.tails + carry.dropped) <= set(carry.streams):
        yield f"{stack.blocks}: tails and dropped must be streams"
    if not set(carry.ignored) <= set(carry.returns) - set(carry.streams):
        yield f"{stack.blocks}: what is ignored must be returned, and be no stream"


def _signature_drift(stack: Stack, blocks: list[torch.nn.Module]) -> Iterator[str]:
    for block in blocks:
        for module in called_modules(block, stack):
            try:
                positions(type(module).forward, stack.carry)
            except ValueError as error:
                yield str(error)
                return


def _unlisted(network: torch.nn.Module, listed: list[torch.nn.Module]) -> Iterator[str]:
    inside = {id(module) for block in listed for module in block.modules()}
    for path, module in network.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        if id(module[0]) not in inside and any(map(_names_options, module[0].modules())):
            inside.update(id(inner) for inner in module.modules())  # report the outermost list
            yield path


def _names_options(module: torch.nn.Module) -> bool:
    return "transformer_options" in inspect.signature(type(module).forward).parameters
