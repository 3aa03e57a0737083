"""Compares every claim of an architecture file with the recording of one real model call.

`mismatches` returns sentences, none if all claims hold. The negative controls in
tests/host/test_architectures.py prove for each kind of claim that a wrong one is reported.
"""

from collections.abc import Iterator

import torch
from architecture_recording import Recording, Visit
from slipstream.backends.architectures import (
    JOIN_SKIP,
    Architecture,
    Binding,
    Stack,
    called_modules,
    stack_blocks,
)


def mismatches(architecture: Architecture, recording: Recording) -> list[str]:
    """Claims of the file that the recording contradicts; empty if all of them hold."""
    found = [*_order(architecture, recording), *_notes(architecture, recording)]
    for stack in (*architecture.stacks, *architecture.side):
        for visit in recording.of(stack):
            found.extend(f"{stack.blocks}[{visit.index}] {s}" for s in _call(stack, visit))
        found.extend(f"{stack.blocks} {s}" for s in _attention(architecture, stack, recording))
    for stack in architecture.stacks:
        found.extend(f"{stack.blocks} {s}" for s in _ids(architecture, stack, recording))
    if not found:  # the streams are where the file says: follow them from block to block
        found.extend(_chain(architecture, recording))
    return found


def attention_counts(stack: Stack, recording: Recording) -> dict[int, int]:
    """Block index -> override calls in one run of the block, its children together."""
    counts: dict[int, int] = {}
    for visit in recording.of(stack):
        counts[visit.index] = counts.get(visit.index, 0) + len(visit.options)
    runs = [visit.index for visit in recording.of(stack) if visit.child == 0]
    return {index: count // runs.count(index) for index, count in counts.items()}


def _order(architecture: Architecture, recording: Recording) -> Iterator[str]:
    main = [stack.blocks for stack in architecture.stacks]
    expected = [
        (stack.blocks, index, child)
        for stack in architecture.stacks
        for index, block in enumerate(stack_blocks(recording.network, stack))
        for child in range(len(called_modules(block, stack)))
    ]
    seen = [(v.path, v.index, v.child) for v in recording.visits if v.path in main]
    if seen != expected:
        yield f"blocks ran in the order {seen}, claimed {expected}"
    for stack in architecture.side:
        blocks = stack_blocks(recording.network, stack)
        if {v.index for v in recording.of(stack)} != set(range(len(blocks))):
            yield f"side stack {stack.blocks} did not run all of its {len(blocks)} blocks"


def _notes(architecture: Architecture, recording: Recording) -> Iterator[str]:
    main = [v for stack in architecture.stacks for v in recording.of(stack)]
    observed = {
        "diffusion_model_wrappers": recording.num_wrapper > 0,
        "reaches_override": recording.num_override > 0,
        "prefetches": recording.num_prefetch_queues > 0,
        "in_place": any(v.wrote_input for v in main),
        "unet": any(stack.children for stack in architecture.stacks),
    }
    for name, value in observed.items():
        if getattr(architecture.notes, name) != value:
            yield f"notes.{name} is {not value}, observed {value}"


def _call(stack: Stack, visit: Visit) -> Iterator[str]:
    """Streams are tensors where the file says, and come back in the same shapes and number."""
    carry = stack.carry
    num_returned = len(visit.result) if isinstance(visit.result, tuple | list) else 1
    if num_returned != len(carry.returns):
        yield f"returned {num_returned} values, claimed {carry.returns}"
        return
    try:
        inputs = _inputs(stack, visit)
    except (KeyError, IndexError, ValueError) as error:
        yield f"did not get {carry.args}: {error}"
        return
    if len(inputs) != len(carry.streams) or not all(torch.is_tensor(x) for x in inputs):
        yield f"got no tensor for each of {carry.streams} in {carry.args}"
        return
    for name, before, after in zip(carry.streams, inputs, _outputs(stack, visit), strict=True):
        if (after is None) != (name in carry.dropped and visit.is_last):
            yield f"returned {'None' if after is None else 'a tensor'} for {name}"
        elif after is not None and not stack.children and after.shape != before.shape:
            yield f"took {tuple(before.shape)} for {name} and returned {tuple(after.shape)}"


def _attention(architecture: Architecture, stack: Stack, recording: Recording) -> Iterator[str]:
    for index, count in attention_counts(stack, recording).items():
        if stack.attention_calls is not None and count != stack.attention_calls:
            yield f"block {index} made {count} attention calls, claimed {stack.attention_calls}"
    unseen = sum(v.num_sdpa - len(v.options) for v in recording.of(stack))
    claimed = stack.bypasses * len(recording.of(stack))
    if stack in architecture.stacks and architecture.notes.reaches_override and unseen != claimed:
        yield f"made {unseen} attention calls that do not reach the override, claimed {claimed}"


def _ids(architecture: Architecture, stack: Stack, recording: Recording) -> Iterator[str]:
    notes = architecture.notes
    for visit in recording.of(stack):
        for options in visit.options:
            if notes.unet:
                seen, claimed = options.get("block"), (stack.block_type, visit.index)
            else:
                seen = (options.get("block_type"), options.get("block_index"))
                claimed = (
                    stack.block_type if notes.block_types else None,
                    visit.index if notes.block_ids else None,
                )
            if seen != claimed:
                yield f"block {visit.index} has the id {seen} in its options, claimed {claimed}"
                return


def _chain(architecture: Architecture, recording: Recording) -> Iterator[str]:
    """Each block takes what the one before it left, joined as claimed between the stacks."""
    broken = []
    previous: tuple[Stack, Visit] | None = None
    levels: list[torch.Tensor] = []  # outputs of a U-Net's input levels
    for stack in architecture.stacks:
        visits = recording.of(stack)
        for visit in visits:
            if previous is not None and not _follows(previous, (stack, visit), levels):
                broken.append(f"{stack.blocks}[{visit.index}] did not get what came before it")
            previous = (stack, visit)
            if architecture.notes.unet and stack is architecture.stacks[0]:
                levels[visit.index :] = [visit.result]
    if broken and not architecture.notes.adds_between:
        yield from broken
    if architecture.notes.adds_between and not broken:
        yield "notes.adds_between is True, but every block got what the one before it returned"


def _follows(
    previous: tuple[Stack, Visit], now: tuple[Stack, Visit], levels: list[torch.Tensor]
) -> bool:
    (before, last), (stack, visit) = previous, now
    outputs = dict(zip(before.carry.streams, _outputs(before, last), strict=True))
    inputs = _inputs(stack, visit)
    starts_stack = stack is not before
    if stack.joins == JOIN_SKIP:
        if visit.child == 0:
            outputs = {"x": torch.cat((last.result, levels.pop()), dim=1)}
        return torch.equal(outputs["x"], inputs[0])
    if starts_stack and stack.joins:
        joined = torch.cat([outputs[name] for name in stack.joins.split(",")], dim=1)
        heads = sum(
            outputs[n].shape[1] for n in before.carry.streams if n not in before.carry.tails
        )
        return _agree(joined, inputs[0], tail=bool(before.carry.tails), at_least=heads + 1)
    return len(outputs) == len(inputs) and all(
        _agree(outputs[name], value, tail=name in stack.carry.tails, at_least=1)
        for name, value in zip(stack.carry.streams, inputs, strict=True)
    )


def _agree(old: torch.Tensor, new: torch.Tensor, *, tail: bool, at_least: int) -> bool:
    """Equal; with a replaced tail, equal in the first tokens (dim 1) and not to the end."""
    if not tail:
        return old.shape == new.shape and torch.equal(old, new)
    length = min(old.shape[1], new.shape[1])
    same = [torch.equal(old[:, i], new[:, i]) for i in range(length)]
    common = same.index(False) if False in same else length
    return at_least <= common < max(old.shape[1], new.shape[1])


def _inputs(stack: Stack, visit: Visit) -> tuple[torch.Tensor, ...]:
    return Binding(visit.module, stack.carry).read(visit.args, visit.kwargs)


def _outputs(stack: Stack, visit: Visit) -> tuple[torch.Tensor, ...]:
    return Binding(visit.module, stack.carry).outputs(visit.result)
