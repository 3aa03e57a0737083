"""The vocabulary of an architecture file, and the lookup of the live blocks it names.

An Architecture says, as data, what ComfyUI's own forward does with its blocks: which lists it
walks, how it passes hidden states, what it puts into transformer_options. Nothing here runs a
model; `drift.py` and the guard in the tests compare every claim with ComfyUI.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

JOIN_CAT = "txt,img"  # cat((txt, img), dim=1): how most dual-stream models enter single blocks
JOIN_SKIP = "skip"  # U-Net: cat((h, output of the mirrored input block), dim=1) before each block


@dataclass(frozen=True, kw_only=True)
class Carry:
    """Which arguments of a block's forward carry hidden states, and what comes back.

    streams: names of the streams; args: for each stream the forward parameter that holds it,
    whether the host passes it by position or by keyword ("" is the first position under any name;
    for a forward that only takes *args, the names of its first positions in order).
    returns: what the block returns, in order (one stream: a bare tensor); names that are no stream
    are further outputs. packed: the single argument holds a tuple of all streams, so does the
    result.
    tails: streams of which the host keeps only the head: it cuts off the end and appends other
    tokens before the next block. dropped: streams that the stack's last block returns as None.
    ignored: further outputs that the host does not read, so a block that is left out returns None.
    """

    streams: tuple[str, ...] = ("x",)
    args: tuple[str, ...] = ("x",)
    returns: tuple[str, ...] = ("x",)
    packed: bool = False
    tails: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stack:
    """An ordered list of blocks that the host's own loop runs one after the other.

    blocks: attribute path of the ModuleList (ModuleDict, or a single block) in the network;
    block_type: the word ComfyUI puts into transformer_options["block_type"], and our reports show;
    carry: the calling convention; attention_calls: override calls per block, None if it varies;
    bypasses: further attention calls per block that do not reach the override;
    joins: how this stack's input is made from the previous one's streams, "" if it is the same;
    children: the host calls each block's children one after the other and never the block, so
    hooks and forward overrides belong on the children.
    """

    blocks: str
    block_type: str
    carry: Carry = field(default_factory=Carry)
    attention_calls: int | None = 1
    bypasses: int = 0
    joins: str = ""
    children: bool = False


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Facts of the host's code that techniques ask for.

    diffusion_model_wrappers: the class runs DIFFUSION_MODEL wrappers (else use APPLY_MODEL);
    reaches_override: its main attention passes transformer_options; options_through: the
    parameter of the blocks that they come in by (a function that holds them, if it is another);
    unbatched: arguments (or keys in them) whose first dimension is not the batch, whatever its
    length;
    block_ids: those options carry block_index; block_types: and block_type;
    prefetches: it drives core's prefetch queue itself; unet: blocks are U-Net levels, not one
    residual stream; in_place: blocks write into their input; adds_between: the host changes the
    stream between blocks by itself, without ControlNet or patches; adds_from_stream: what it adds
    is computed from the stream at that point; whole_sequence: for a host that keeps keys and
    values of a part of the sequence between calls, the options that make it run all of it in every
    call; remarks: anything else.
    """

    diffusion_model_wrappers: bool = True
    reaches_override: bool = True
    block_ids: bool = True
    block_types: bool = True
    prefetches: bool = False
    unet: bool = False
    in_place: bool = False
    adds_between: bool = False
    adds_from_stream: bool = False
    options_through: str = "transformer_options"
    unbatched: tuple[str, ...] = ()
    whole_sequence: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family: ComfyUI's class, its block stacks, its token plan, notes.

    class_name: of the network in `comfy.ldm`; module: the end of its module's name, where the
    class name alone is not unique; name: what users call it; stacks: the blocks between the
    embedders and the final layer, in execution order, all of one hidden state; side: further
    blocks with a stream of their own (refiners, control branches): they have weights to offload
    and attention to swap, but leave them alone when blocks are skipped; tokens: the plan that
    sequence parallel reads (None: no plan yet).
    """

    class_name: str
    name: str
    stacks: tuple[Stack, ...]
    side: tuple[Stack, ...] = ()
    module: str = ""
    tokens: Any | None = None
    notes: Notes = field(default_factory=Notes)


def stack_blocks(network: torch.nn.Module, stack: Stack) -> list[torch.nn.Module]:
    """The live blocks of a stack in execution order; empty if this checkpoint has none."""
    owner: Any = network
    for part in stack.blocks.split("."):
        owner = getattr(owner, part)
        if owner is None:
            return []
    if isinstance(owner, torch.nn.ModuleDict):
        return list(owner.values())
    return list(owner) if isinstance(owner, torch.nn.ModuleList) else [owner]


def called_modules(block: torch.nn.Module, stack: Stack) -> list[torch.nn.Module]:
    """The modules that the host calls for one block: itself, or its children in order."""
    return list(block.children()) if stack.children else [block]


def whole_sequence(architecture: Architecture | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """transformer_options of a call in which the host runs the whole sequence, as in the first."""
    return _merged(options, architecture.notes.whole_sequence if architecture else {})


def _merged(ours: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both, where `more` wins; dicts within are merged the same way and copied."""
    both = dict(ours)
    for name, value in more.items():
        old = both.get(name)
        both[name] = _merged(old or {}, value) if isinstance(value, Mapping) else value
    return both
