"""Reading and replacing the streams in one call of a block, whoever passes what by keyword.

A Binding is made once per block from its class's forward, so that instance overrides and
torch.compile's replacement do not change what it sees.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .data import Carry

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Binding:
    """How one block takes and returns its streams.

    block: a live block; carry: its calling convention. Raises ValueError if the block's forward
    has no parameter of a claimed name.
    """

    def __init__(self, block: torch.nn.Module, carry: Carry):
        self.carry = carry
        self.positions = positions(type(block).forward, carry)
        self._args = tuple((name, self.positions[name]) for name in carry.args)
        # where the streams are in what the block returns, and the other way round
        self._returned = tuple(carry.returns.index(name) for name in carry.streams)
        self._returns: tuple[int | None, ...] | None = None  # None: what nobody reads
        if set(carry.returns) - set(carry.ignored) == set(carry.streams):
            self._returns = tuple(
                None if name in carry.ignored else carry.streams.index(name)
                for name in carry.returns
            )

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The streams of a call, in the order of `carry.streams`."""
        found = [kwargs[name] if name in kwargs else args[at] for name, at in self._args]
        return tuple(found[0] if self.carry.packed else found)

    def write(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other streams; the given args and kwargs stay as they are."""
        values = (tuple(streams),) if self.carry.packed else streams
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, value in zip(self.carry.args, values, strict=True):
            if name in kwargs:
                new_kwargs[name] = value
            else:
                new_args[self.positions[name]] = value
        return tuple(new_args), new_kwargs

    def outputs(self, result: Any) -> tuple[Any, ...]:
        """The streams in what the block returned, in the order of `carry.streams`."""
        if len(self.carry.returns) == 1:
            return (result,)
        return tuple([result[at] for at in self._returned])

    def result(self, streams: tuple[Any, ...]) -> Any:
        """What the block returns for these streams; every other output must be an ignored one."""
        if self._returns is None:
            raise ValueError(f"this block also returns {', '.join(self.carry.returns)}")
        if len(self._returns) == 1:
            return streams[0]
        return tuple([None if at is None else streams[at] for at in self._returns])


@functools.cache  # every run asks again for the same few classes, and inspect is slow
def positions(forward: Callable[..., Any], carry: Carry) -> Mapping[str, int]:
    """Position of each carry argument in a block class's forward, without self."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in POSITIONAL]
    if not names and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return {name: index for index, name in enumerate(carry.args)}
    missing = [name for name in carry.args if name and name not in names]
    if missing or not names:
        raise ValueError(f"forward has no '{missing[0]}' (it takes {', '.join(names)})")
    return {name: names.index(name) if name else 0 for name in carry.args}
