"""A token plan on a live network: the modules it names, checked before anything runs."""

import fnmatch
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..backends.architectures.tokens import Blocks, Gather, Island, Name, Streams, TokenPlan
from .shards import PlanError

LOCAL = "local"  # marks modules whose attention needs no exchange


@dataclass(frozen=True)
class Bound:
    """A plan's rules with the modules they apply to, each as (path, module).

    marks: modules whose attention is local, or has layouts of its own.
    """

    plan: TokenPlan
    blocks: tuple[tuple[Blocks, str, torch.nn.Module], ...]
    end: tuple[tuple[str, torch.nn.Module], ...]
    islands: tuple[tuple[Island, str, torch.nn.Module], ...]
    marks: tuple[tuple[str | tuple[Streams, Streams], torch.nn.Module], ...]


def bind(plan: TokenPlan, network: torch.nn.Module) -> Bound:
    """The plan's modules in `network`. Raises PlanError if a path or an argument is not there."""
    modules = list(network.named_modules())
    owner = type(network).__name__

    def match(path: str, *, optional: bool = False) -> list[tuple[str, torch.nn.Module]]:
        found = [(name, module) for name, module in modules if _matches(name, path)]
        if not found and not optional:
            raise PlanError(f"{owner} has no '{path}', which its token plan names")
        return found

    blocks = []
    for rule in plan.blocks:
        for name, module in match(rule.path, optional=rule.optional):
            _check(owner, name, module, rule.args)
            blocks.append((rule, name, module))
    if not blocks:
        raise PlanError(f"{owner} has none of the blocks that its token plan names")
    end = match(plan.end.path)
    if isinstance(plan.end, Gather):
        for name, module in end:
            _check(owner, name, module, plan.end.args)
    islands = []
    for island in plan.islands:
        for name, module in match(island.path, optional=island.optional):
            _check(owner, name, module, island.args)
            islands.append((island, name, module))
    marks: list[tuple[str | tuple[Streams, Streams], torch.nn.Module]] = []
    for path in plan.local_attention:
        marks += [(LOCAL, m) for _, m in match(path, optional=True)]
    marks += [
        (layouts, m) for path, layouts in plan.attention_layouts.items() for _, m in match(path)
    ]
    return Bound(plan, tuple(blocks), tuple(end), tuple(islands), tuple(marks))


def parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the module's forward parameters without self."""
    return _signature(type(module))[0]  # type: ignore[arg-type]


def takes_any(module: torch.nn.Module) -> bool:
    """Whether forward has **kwargs: then only a call shows which names it is given."""
    return _signature(type(module))[1]  # type: ignore[arg-type]


@cache
def _signature(cls: Any) -> tuple[tuple[str, ...], bool]:
    found = inspect.signature(cls.forward).parameters
    return tuple(found)[1:], any(p.kind is p.VAR_KEYWORD for p in found.values())


def argument(module: torch.nn.Module, args: list[Any], kwargs: dict[str, Any], name: Name) -> Any:
    """A call's argument by parameter name or position; None if it was not passed."""
    if isinstance(name, int):
        return args[name] if name < len(args) else None
    if name in kwargs:
        return kwargs[name]
    names = parameters(module)
    if name not in names:
        raise PlanError(
            f"{type(module).__name__} was called without '{name}', which its plan names"
        )
    at = names.index(name)
    return args[at] if at < len(args) else None


def set_argument(
    module: torch.nn.Module, args: list[Any], kwargs: dict[str, Any], name: Name, value: Any
) -> None:
    """Replace an argument that was passed."""
    if isinstance(name, int):
        args[name] = value
    elif name in kwargs:
        kwargs[name] = value
    else:
        args[parameters(module).index(name)] = value


def _matches(name: str, path: str) -> bool:
    parts, patterns = name.split("."), path.split(".")
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part, pattern) for part, pattern in zip(parts, patterns, strict=True)
    )


def _check(owner: str, path: str, module: torch.nn.Module, names: Iterable[Name]) -> None:
    known = parameters(module)
    missing = [n for n in names if isinstance(n, str) and n not in known]
    if missing and not takes_any(module):
        raise PlanError(
            f"{owner}.{path}: forward has no '{missing[0]}', which its token plan names "
            f"(it takes {', '.join(known)})"
        )
