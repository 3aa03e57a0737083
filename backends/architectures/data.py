"""The vocabulary of an architecture file, and the checks of one against a live network."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

JOIN_CAT = "txt,img"  # cat((txt, img), dim=1): how dual-stream models enter their single blocks


@dataclass(frozen=True, kw_only=True)
class Carry:
    """Which arguments of a block's forward carry hidden states, and what comes back.

    streams: names of the streams; args: for each stream the forward parameter that holds it;
    returns: the streams in the order the block returns them (one stream: a bare tensor).
    packed: the single argument holds a tuple of all streams and so does the result.
    """

    streams: tuple[str, ...] = ("x",)
    args: tuple[str, ...] = ("x",)
    returns: tuple[str, ...] = ("x",)
    packed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """An ordered list of blocks that the host's own loop runs one after the other.

    blocks: attribute path of the ModuleList (or a single block) in the network;
    block_type: the word ComfyUI puts into transformer_options["block_type"], and our reports show;
    carry: the calling convention; attention_calls: override calls per block, None if it varies;
    joins: how this stack's input is made from the previous one's streams, "" if it is the same.
    """

    blocks: str
    block_type: str
    carry: Carry = field(default_factory=Carry)
    attention_calls: int | None = 1
    joins: str = ""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Facts of the host's code that techniques ask for.

    diffusion_model_wrappers: the class runs DIFFUSION_MODEL wrappers (else use APPLY_MODEL);
    reaches_override: its main attention passes transformer_options;
    block_ids: those options carry block_index; prefetches: it drives core's prefetch queue
    itself; unet: blocks are U-Net levels, not one residual stream; in_place: blocks write into
    their input; remarks: anything else, in words.
    """

    diffusion_model_wrappers: bool = True
    reaches_override: bool = True
    block_ids: bool = True
    prefetches: bool = False
    unet: bool = False
    in_place: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family: ComfyUI's class, its block stacks, its token plan, notes.

    class_name: of the network in `comfy.ldm`; name: what users call it; tokens: the plan that
    sequence parallel reads (None: no plan yet).
    """

    class_name: str
    name: str
    stacks: tuple[Stack, ...]
    tokens: Any | None = None
    notes: Notes = field(default_factory=Notes)


def stack_blocks(network: torch.nn.Module, stack: Stack) -> list[torch.nn.Module]:
    """The live blocks of a stack in execution order; empty if this checkpoint has none."""
    owner: Any = network
    for part in stack.blocks.split("."):
        owner = getattr(owner, part)
    if owner is None:
        return []
    return list(owner) if isinstance(owner, torch.nn.ModuleList) else [owner]


def drift(architecture: Architecture, network: torch.nn.Module) -> list[str]:
    """What the data claims and the live network does not show, as sentences; empty if all holds."""
    found = []
    for stack in architecture.stacks:
        try:
            blocks = stack_blocks(network, stack)
        except AttributeError:
            found.append(f"{architecture.class_name} has no '{stack.blocks}'")
            continue
        if not blocks:
            continue
        parameters = inspect.signature(blocks[0].forward).parameters
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        missing = [a for a in stack.carry.args if a not in parameters and not variadic]
        found.extend(
            f"{architecture.class_name}.{stack.blocks}: forward has no '{arg}' "
            f"(it takes {', '.join(parameters)})"
            for arg in missing
        )
    return found
