"""One call of a network: its arguments by name, and which of them came by position."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .wire import Unsupported

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

    def run(self, function: Callable[..., Any]) -> Any:
        """function called with these arguments, by position and name as they came."""
        everything = {**self.arguments, OPTIONS: self.options}
        args = [everything.pop(name) for name in self.positional]
        return function(*args, **everything)
