"""The vocabulary of a family file: which file layers make up which layer of ComfyUI's network.

Layers inside blocks are named as Nunchaku's newer files name them (diffusers' names, q/k/v fused);
`aliases` turn the older names into these. One table serves both directions: reading takes the
first choice whose layers are all in the file, converting writes the first choice.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

FUSED_QKV = (".to_qkv", ".add_qkv_proj")  # file layers, as the newer files name them
Shapes = dict[str, tuple[int, ...]]  # tensor name in ComfyUI's network -> shape


def within(stem: str, name: str) -> tuple[int, str] | None:
    """(index, rest) of a name `stem.index.rest`; None for any other name."""
    if not name.startswith(f"{stem}."):
        return None
    index, _, rest = name[len(stem) + 1 :].partition(".")
    return (int(index), rest) if rest and re.fullmatch(r"[0-9]{1,6}", index) else None


def num_blocks(names: Iterable[str], stem: str) -> int:
    """How many blocks `stem`.i these names are of."""
    return len({found[0] for name in names if (found := within(stem, name)) is not None})


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file layer, or part i of n equal row ranges of it.

    unsigned: its int4 input is shifted to be non-negative (a topology rule, not a key).
    """

    name: str
    part: tuple[int, int] = (0, 1)
    unsigned: bool = False


Grid = tuple[tuple[Piece, ...], ...]  # rows of output features, each of pieces over input features


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of ComfyUI's network within a block.

    choices: alternatives of what the file may hold; the first one is Nunchaku's.
    sizes: heights of the grid's rows (widths of its columns) in units of the hidden size, for
    converting; -1 is the rest. chunks: for a modulation layer, how many vectors it makes.
    """

    target: str
    choices: tuple[Grid, ...]
    sizes: tuple[int, ...] = (-1,)
    chunks: int = 0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Blocks `source`.i of the file are blocks `target`.i of the network.

    copies: (file name, network name) of tensors that are not quantised, by prefix.
    """

    source: str
    target: str
    layers: tuple[Layer, ...]
    copies: tuple[tuple[str, str], ...] = ()

    def in_source(self, name: str) -> tuple[int, str] | None:
        """(index, name within the block) of a file's name; None if it is not in these blocks."""
        return within(self.source, name)

    def in_target(self, name: str) -> tuple[int, str] | None:
        """The same of a name in ComfyUI's network."""
        return within(self.target, name)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model of a family that ComfyUI tells by a tensor and diffusers by flags in `config`.

    title: for people; tensor: its name in ComfyUI's network; is_marker: it is empty and ComfyUI's
    alone, no file of Nunchaku's holds it; flags: true in the `config` metadata; in_name: how such
    files are called, and advice, what to do if nothing but the name says so (markers only).
    """

    title: str
    tensor: str
    flags: tuple[str, ...]
    is_marker: bool = False
    in_name: str = ""
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything needed to read and write the files of one model family.

    id, title: for the report and for people; model_class: in Nunchaku's metadata; dialect: the one
    that Nunchaku reads this family in; markers: file layers or tensors that only this family has
    (all of one tuple); native: the same in ComfyUI's own names; aliases: (block, older name,
    name); rest: (file prefix, network prefix) outside the blocks; swapped: network layers whose
    halves (scale, shift) are exchanged; diffusers_config: the `config` metadata from the network's
    tensor shapes; fp4_rows: nvfp4's factor is written per row (wcscales) instead of once (wtscale)
    in every layer, not only where q, k and v are fused; comfy_config: the metadata of that name;
    quantization: more of the quantization_config; constants: fp32 vectors that the network needs
    and no file of this family has; doubtful: a tensor by which int4 files are told of which it is
    not known what layers are unsigned; variants: models told apart by a tensor; keeps_dtype: 16-bit
    tensors are handed to ComfyUI as the file has them. Families that are only read (READ_ONLY) have
    no native markers and no diffusers_config.
    """

    id: str
    title: str
    model_class: str
    dialect: str
    markers: tuple[tuple[str, ...], ...]
    native: tuple[str, ...]
    blocks: tuple[Block, ...]
    rest: tuple[tuple[str, str], ...]
    diffusers_config: Callable[[Shapes], dict[str, Any]] = lambda shapes: {}
    aliases: tuple[tuple[str, str, str], ...] = ()
    swapped: frozenset[str] = field(default_factory=frozenset)
    fp4_rows: bool = False
    comfy_config: Callable[[Shapes], dict[str, Any]] | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()
    doubtful: str = ""
    variants: tuple[Variant, ...] = ()
    keeps_dtype: bool = False

    def canonical(self, name: str) -> str:
        """The layer or tensor name with older names inside blocks replaced."""
        return _replaced(name, self.aliases)

    def written(self, name: str) -> str:
        """Inverse of canonical: the name that this family's files have."""
        if self.dialect != "nunchaku-1":
            return name
        return _replaced(name, tuple((block, new, old) for block, old, new in self.aliases))

    def scales_rows(self, name: str) -> bool:
        """Whether this file layer's nvfp4 factor is written per row: every loader honours that,
        while fused forwards of Nunchaku pass no factor of their own (Z-Image)."""
        return self.fp4_rows or self.canonical(name).endswith(FUSED_QKV)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The `config` metadata of a network: diffusers' config with the flags of its variants."""
        flags = {f: True for v in self.variants if v.tensor in shapes for f in v.flags}
        return self.diffusers_config(shapes) | flags

    def is_marker(self, name: str) -> bool:
        """Whether this tensor of ComfyUI's network is no part of Nunchaku's files."""
        return any(v.is_marker and v.tensor == name for v in self.variants)

    def matches(self, names: Collection[str]) -> bool:
        """Whether a file with these layer and tensor names is of this family."""
        known = set(names)
        return any(all(mark in known for mark in marks) for marks in self.markers)

    def matches_native(self, names: Collection[str]) -> bool:
        """The same for a file in ComfyUI's own names."""
        known = set(names)
        return bool(self.native) and all(mark in known for mark in self.native)


def _replaced(name: str, replacements: tuple[tuple[str, str, str], ...]) -> str:
    for block, old, new in replacements:
        found = within(block, name)
        if found is not None and (found[1] == old or found[1].startswith(f"{old}.")):
            return f"{block}.{found[0]}.{new}{found[1][len(old) :]}"
    return name


def one(name: str, *, unsigned: bool = False) -> Grid:
    """The whole layer is one file layer."""
    return ((Piece(name=name, unsigned=unsigned),),)


def part(name: str, index: int, count: int) -> Grid:
    """The layer is one of several equal row ranges of a file layer."""
    return ((Piece(name=name, part=(index, count)),),)


def rows(*names: str) -> Grid:
    """The layer is file layers one below the other: their outputs are concatenated."""
    return tuple((Piece(name=name),) for name in names)


def columns(*pieces: Piece) -> Grid:
    """The layer is file layers side by side: their inputs are concatenated, outputs added."""
    return (tuple(pieces),)


def layer(target: str, *choices: Grid, sizes: tuple[int, ...] = (-1,), chunks: int = 0) -> Layer:
    """A Layer; see there."""
    return Layer(target=target, choices=choices, sizes=sizes, chunks=chunks)
