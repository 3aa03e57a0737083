"""The state of one model call on this rank: what is cut, gathered and exchanged, and what fits.

The network's own forward runs on every rank; hooks.py calls in here before and behind its
modules, attention.py at its attention. Whatever does not fit the token plan raises PlanError:
never a wrong image. Ranks above 0 leave with EarlyExit once rank 0 has their tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..backends.architectures.tokens import Blocks, Name, Streams, Tok
from ..backends.compiler import unrecorded
from .bind import LOCAL, Bound, argument, set_argument
from .comm import Clock
from .mesh import Mesh
from .shards import Arrangement, PlanError, Shards, arrange, pick


class EarlyExit(Exception):  # noqa: N818 - the regular end of a forward on ranks above 0
    """This rank has given its tokens to rank 0."""


class Call:
    """The state of one shared call: lengths, whether blocks are running, what was counted.

    may_skip: blocks may be left out (a block cache decides so), so that a block without an
    attention call is no sign of a bypass.
    """

    def __init__(self, bound: Bound, mesh: Mesh, clock: Clock, *, may_skip: bool = False):
        self.bound, self.plan, self.mesh, self.clock = bound, bound.plan, mesh, clock
        self.may_skip = may_skip
        self.shards = Shards(rank=mesh.rank, world=mesh.world, replicate=self.plan.replicate)
        self.is_active = False
        self.is_over = False
        self.num_exchanged = self.num_local = 0
        self.lengths: dict[str, int] = {}  # tokens per stream, kept for the report
        self._rule: Blocks | None = None
        self._marks: list[str | tuple[Streams, Streams]] = []
        self._counts: list[int] = []
        self._memo: dict[Any, Any] = {}
        self._memo_version = -1
        self._keep: list[Any] = []  # what the memo knows by id must not be freed

    def close(self) -> None:
        """Drop every tensor."""
        self.is_active, self.is_over = False, True
        self._memo.clear()
        self._keep.clear()
        self.shards.memo.clear()

    # --- attention

    def attention_is_local(self) -> bool:
        """Whether the attention that runs now needs no exchange."""
        return not self.is_active or bool(self._marks and self._marks[-1] == LOCAL)

    def layouts_of(self, num_queries: int, num_keys: int) -> tuple[Streams, Streams]:
        """The layouts that local queries and keys of these lengths are in."""
        assert self._rule is not None
        if self._marks:
            candidates = [self._marks[-1]]
        else:
            candidates = [(one, one) for one in (self._rule.layout, *self._rule.other_layouts)]
        local = self.shards.local
        for layouts in candidates:
            assert not isinstance(layouts, str)
            if num_queries == local(layouts[0]) and num_keys == local(layouts[1]):
                return layouts
        raise PlanError(
            f"attention of {num_queries} queries and {num_keys} keys fits none of the layouts "
            f"{candidates} (local lengths {self.shards.parts})"
        )

    def arrangement(self, layout: Streams) -> Arrangement:
        """The order of `layout` after an exchange."""
        return self._remember(
            ("arrangement", layout),
            lambda: arrange(self.shards, layout, ulysses=self.mesh.ulysses, ring=self.mesh.ring),
        )

    def whole_mask(
        self, mask: torch.Tensor | None, q_layout: Streams, k_layout: Streams
    ) -> torch.Tensor | None:
        """The mask as [B or 1, H or 1, Nq or 1, Nk or 1] over all tokens in canonical order.

        Some blocks build masks from local lengths (Qwen-Image, Mage-Flow): those are gathered.
        """
        if mask is None:
            return None
        while mask.ndim < 4:
            mask = mask.unsqueeze(0) if mask.ndim == 2 else mask.unsqueeze(1)
        for dim, layout in ((3, k_layout), (2, q_layout)):
            length, total = mask.shape[dim], self.shards.total(layout)
            if length in (1, total):
                continue
            if length != self.shards.local(layout):
                raise PlanError(f"attention mask of {tuple(mask.shape)} for {total} tokens")
            mask = self.gather(mask, dim, layout)
        return mask

    # --- tokens

    def gather(
        self, local: torch.Tensor, dim: int, streams: Streams, *, leader_only: bool = False
    ) -> torch.Tensor:
        """All tokens from local ones; on other ranks an unfinished tensor if leader_only."""
        if all(s in self.shards.replicated for s in streams):
            return local
        plan = self.arrangement(streams)
        own = pick(local, dim, plan.own)
        with self.clock.measure("gather"):
            whole = self.mesh.gather(own, plan.rows, dim, leader_only=leader_only)
        if whole is None:
            return local
        if plan.extra:
            whole = torch.cat((whole, pick(local, dim, plan.extra)), dim)
        order = self._gather_order(streams)
        return whole if order is None else pick(whole, dim, order)

    def _gather_order(self, streams: Streams) -> Any:
        """to_canonical of the rank-major order of all ranks, whatever the ring degree is."""
        return self._remember(
            ("gather", streams),
            lambda: arrange(self.shards, streams, ulysses=self.mesh.world, ring=1).to_canonical,
        )

    def cut(self, value: Any, tok: Tok, *, where: str, is_constant: bool = True) -> Any:
        """This rank's part of an argument; local values, length 1 and other types pass.

        is_constant: the same object comes again and is not written to, so that its part is kept.
        """
        if tok.fn is not None:
            function = tok.fn
            return self._by_identity(value, tok, lambda: function(self.shards, value))
        if isinstance(value, (list, tuple)):
            parts = [self.cut(v, tok, where=where, is_constant=is_constant) for v in value]
            return type(value)(parts)
        if not torch.is_tensor(value) or all(s in self.shards.replicated for s in tok.streams):
            return value
        length, total = value.shape[tok.dim], self.shards.total(tok.streams)
        if length == total:
            if not is_constant:
                return self.shards.cut(value, tok.dim, tok.streams)
            return self._by_identity(
                value, tok, lambda: self.shards.cut(value, tok.dim, tok.streams)
            )
        if length in (1, self.shards.local(tok.streams)):
            return value
        raise PlanError(
            f"{where} has {length} tokens along dim {tok.dim}; {total} or this rank's "
            f"{self.shards.local(tok.streams)} were expected"
        )

    def _by_identity(self, value: Any, tok: Tok, make: Callable[[], Any]) -> Any:
        self._keep.append(value)
        return self._remember((id(value), id(tok)), make)

    def _remember(self, key: Any, make: Callable[[], Any]) -> Any:
        if self._memo_version != self.shards.version:
            self._memo.clear()
            self._memo_version = self.shards.version
        if key not in self._memo:
            with unrecorded():
                self._memo[key] = make()
        return self._memo[key]

    # --- hooks

    def enter_block(
        self, rule: Blocks, path: str, module: torch.nn.Module, args: list[Any], kwargs: Any
    ) -> None:
        """Cut the block's arguments in place, having defined the streams that start here."""
        if self.is_over:
            return
        if not self.is_active and not rule.define and rule.enter is None:
            raise PlanError(f"{path} runs before the blocks that define its tokens")
        self.is_active = True
        if rule.enter is not None:
            rule.enter(self.shards, lambda name: argument(module, args, kwargs, name))
        for name in rule.define:
            value, tok = argument(module, args, kwargs, name), rule.args[name]
            if value is not None and tok.streams[0] not in self.shards.full:
                self.shards.define(tok.streams[0], value.shape[tok.dim])
        missing = [s for s in rule.layout if s not in self.shards.full]
        if missing:
            raise PlanError(f"{path}: nothing defines the length of '{missing[0]}'")
        self._rule = rule
        for name, tok in rule.args.items():
            value = argument(module, args, kwargs, name)
            if value is None:
                continue
            local = self.cut(
                value, tok, where=f"{path}: {name}", is_constant=name not in rule.define
            )
            if local is not value:
                set_argument(module, args, kwargs, name, local)
        self._counts.append(self.num_exchanged)

    def leave_block(self, rule: Blocks, path: str) -> None:
        """Check that the block's attention went through the exchange."""
        if not self.is_active or not self._counts:
            return
        calls = self.num_exchanged - self._counts.pop()
        if calls not in rule.attention and not (self.may_skip and calls == 0):
            raise PlanError(
                f"{path} made {calls} exchanged attention calls, {rule.attention[0]} expected: "
                "its attention does not pass through ComfyUI's hook"
            )

    def gather_arguments(
        self,
        names: Mapping[Name, Tok],
        path: str,
        module: torch.nn.Module,
        args: list[Any],
        kwargs: dict[str, Any],
        *,
        leader_only: bool,
    ) -> None:
        """Make arguments whole, in place."""
        for name, tok in names.items():
            value = argument(module, args, kwargs, name)
            if value is None or value.shape[tok.dim] == self.shards.total(tok.streams):
                continue
            if value.shape[tok.dim] != self.shards.local(tok.streams):
                raise PlanError(f"{path}: {name} has {value.shape[tok.dim]} tokens at the gather")
            whole = self.gather(value, tok.dim, tok.streams, leader_only=leader_only)
            set_argument(module, args, kwargs, name, whole)

    def finish(self) -> None:
        """The sequence is whole on rank 0: hooks do nothing more, other ranks leave."""
        self.lengths = dict(self.shards.full)
        self.close()
        if self.mesh.rank != 0:
            raise EarlyExit

    def mark(self, mark: str | tuple[Streams, Streams]) -> None:
        self._marks.append(mark)

    def unmark(self) -> None:
        if self._marks:
            self._marks.pop()
