"""The hooks of one model call on a network's modules: cut before blocks, gather behind them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..backends.architectures.tokens import Blocks, Gather, Island
from ..backends.compiler import unrecorded
from .bind import LOCAL
from .engine import Call


@contextmanager
def installed(call: Call) -> Iterator[None]:
    """The call's hooks on the network's modules, removed at the end."""
    handles: list[Any] = []
    try:
        for rule, path, module in call.bound.blocks:
            handles += _hook_block(call, rule, path, module)
        handles += _hook_end(call)
        for island, path, module in call.bound.islands:
            handles += _hook_island(call, island, path, module)
        for mark, module in call.bound.marks:
            handles += _hook_mark(call, mark, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        call.close()


def _hook_block(call: Call, rule: Blocks, path: str, module: torch.nn.Module) -> list[Any]:
    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        args, kwargs = list(args), dict(kwargs)
        with unrecorded():
            call.enter_block(rule, path, module, args, kwargs)
        return tuple(args), kwargs

    def after(module: torch.nn.Module, args: Any, out: Any) -> None:
        call.leave_block(rule, path)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def _hook_end(call: Call) -> list[Any]:
    end = call.plan.end
    if isinstance(end, Gather):

        def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if not call.is_active:
                return None
            args, kwargs = list(args), dict(kwargs)
            path = end.path
            with unrecorded():
                call.gather_arguments(end.args, path, module, args, kwargs, leader_only=True)
            call.finish()
            return tuple(args), kwargs

        return [m.register_forward_pre_hook(before, with_kwargs=True) for _, m in call.bound.end]

    def after(module: torch.nn.Module, args: Any, out: Any) -> Any:
        if not call.is_active:
            return None
        tok, parts = end.tok, [out] if end.index is None else list(out)
        at = end.index or 0
        with unrecorded():
            parts[at] = call.gather(parts[at], tok.dim, tok.streams, leader_only=True)
        call.finish()
        return parts[0] if end.index is None else tuple(parts)

    return [call.bound.end[-1][1].register_forward_hook(after)]


def _hook_island(call: Call, island: Island, path: str, module: torch.nn.Module) -> list[Any]:
    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if not call.is_active:
            return None
        args, kwargs = list(args), dict(kwargs)
        with unrecorded():
            call.gather_arguments(island.args, path, module, args, kwargs, leader_only=False)
        call.mark(LOCAL)
        return tuple(args), kwargs

    def after(module: torch.nn.Module, args: Any, out: Any) -> Any:
        if not call.is_active:
            return None
        call.unmark()
        if island.out is None:
            return out
        with unrecorded():
            return call.cut(out, island.out, where=path, is_constant=False)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def _hook_mark(call: Call, mark: Any, module: torch.nn.Module) -> list[Any]:
    def before(module: torch.nn.Module, args: Any) -> None:
        call.mark(mark)

    def after(module: torch.nn.Module, args: Any, out: Any) -> None:
        call.unmark()

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
