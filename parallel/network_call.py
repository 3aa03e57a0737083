"""One call of a network: its arguments by name, and which of them came by position."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .wire import Unsupported, decode, encode

OPTIONS = "transformer_options"


@dataclass(frozen=True)
class NetworkCall:
    """positional: names of the arguments by position; arguments: all but transformer_options."""

    positional: tuple[str, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @staticmethod
    def of(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> "NetworkCall":
        """Read a call of `function`. Raises Unsupported if its arguments have no names."""
        names = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                break
            names.append(parameter.name)
        if len(args) > len(names):
            raise Unsupported(f"{function.__qualname__} takes arguments without names")
        positional = tuple(names[: len(args)])
        arguments = {**dict(zip(positional, args, strict=True)), **kwargs}
        options = arguments.pop(OPTIONS, None) or {}
        return NetworkCall(positional, arguments, options)

    def with_(
        self,
        arguments: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> "NetworkCall":
        return replace(
            self,
            arguments=self.arguments if arguments is None else arguments,
            options=self.options if options is None else options,
        )

    def encode(
        self, rebuilt: Sequence[str], *, dropped: Sequence[str]
    ) -> tuple[Any, list[torch.Tensor]]:
        """The call for the wire: [positional names, arguments, options], tensors beside.

        rebuilt: arguments ("name.key") that the network makes itself when they are left out;
        dropped: options that stay here, as do those of other nodes that cannot travel: a network
        reads ComfyUI's own. An argument that cannot travel raises Unsupported.
        """
        tensors: list[torch.Tensor] = []
        named = dict(self.arguments)
        for path in rebuilt:
            name, _, key = path.partition(".")
            if isinstance(named.get(name), dict):
                named[name] = {k: v for k, v in named[name].items() if k != key}
        arguments = encode(named, tensors, "the call's ")
        options = {}
        for name, value in self.options.items():
            if name in dropped or name.startswith("slipstream"):
                continue
            known = len(tensors)
            try:
                options[name] = encode(value, tensors, name)
            except Unsupported:
                del tensors[known:]
        encoded = [list(self.positional), arguments, options]
        return encoded, [t.contiguous() for t in tensors]

    @staticmethod
    def decode(found: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> "NetworkCall":
        """The call as it was encoded."""
        positional, arguments, options = found
        return NetworkCall(
            tuple(positional),
            decode(arguments, tensors, device=device),
            {k: decode(v, tensors, device=device) for k, v in options.items()},
        )

    def run(self, function: Callable[..., Any]) -> Any:
        """function called with these arguments, by position and name as they came."""
        everything = {**self.arguments, OPTIONS: self.options}
        args = [everything.pop(name) for name in self.positional]
        return function(*args, **everything)
