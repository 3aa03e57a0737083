"""What is known about model architectures, as data: one small file per family.

`find` gives the Architecture of a live network by class name, base classes included. Cache and
offload read the stacks, sequence parallel reads the tokens, attention reads the block ids. The
drift guard (`drift`) asserts what the data claims against the live model, so that a rename in
ComfyUI fails loudly. No torch calls at import.
"""

from .binding import Binding
from .data import (
    JOIN_CAT,
    JOIN_SKIP,
    Architecture,
    Carry,
    Notes,
    Stack,
    called_modules,
    stack_blocks,
    whole_sequence,
)
from .drift import drift, inconsistencies
from .table import ARCHITECTURES, find

__all__ = [
    "ARCHITECTURES",
    "JOIN_CAT",
    "JOIN_SKIP",
    "Architecture",
    "Binding",
    "Carry",
    "Notes",
    "Stack",
    "called_modules",
    "drift",
    "find",
    "inconsistencies",
    "stack_blocks",
    "whole_sequence",
]
