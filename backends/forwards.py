"""Instance-level forwards for the time of one model call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def overridden(
    forwards: Sequence[tuple[torch.nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Each module's instance-level forward, put back afterwards to what it was.

    A block that was compiled in place (Module.compile) keeps its compiled call in another slot.
    """
    saved = []
    try:
        for module, forward in forwards:
            slot = forward_slot(module)
            saved.append((module, slot, module.__dict__.get(slot)))
            module.__dict__[slot] = forward
        yield
    finally:
        for module, slot, previous in reversed(saved):
            if previous is None:
                module.__dict__.pop(slot, None)
            else:
                module.__dict__[slot] = previous


def forward_slot(module: torch.nn.Module) -> str:
    """The attribute that calling `module` runs."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return "_compiled_call_impl" if compiled else "forward"
