"""A block cache over ranks: rank 0 decides, and the workers do as it does.

A decision taken before a call is handed over travels with it, one taken inside is broadcast as a
byte to every lane. Workers can only reuse what they have computed, so in a shared call rank 0
reuses a key's residual only if the last computed call of that key was shared with the same workers.
A call on rank 0 alone is rank 0's own business: the cache tells its residuals from those of shared
calls by ModelCall.num_ranks. What a rank has stored is of its own tokens and rows, so the rows are
dealt once a run where such a cache travels.
"""

from collections.abc import Hashable
from typing import Any

import torch

from ..backends.calls import ModelCall
from .comm import Group


class Decisions:
    """Rank 0's side of one run. `groups`: who follows, while a shared call is under way."""

    def __init__(self) -> None:
        self.groups: tuple[Group, ...] = ()
        self._early: list[tuple[int, bool]] = []  # index of the model call, decision
        self._computing: set[Hashable] = set()
        self._stored: set[Hashable] = set()

    def decide(self, call: ModelCall, reuse: bool) -> bool:
        """What all ranks do; called by the cache with what rank 0 would do."""
        if call.num_ranks == 1:
            return reuse
        reuse = reuse and call.key in self._stored
        if not reuse:
            self._computing.add(call.key)
        if not self.groups:
            self._early.append((call.index, reuse))
        for group in self.groups:
            flag = torch.tensor([reuse], dtype=torch.uint8, device=group.clock.device)
            group.broadcast(flag, root=0)
        return reuse

    def take_early(self, call: ModelCall) -> tuple[bool, ...]:
        """The decisions that must travel with the call that begins now."""
        early, self._early = self._early, []
        return tuple(reuse for index, reuse in early if index == call.index)

    def shared(self) -> None:
        """A shared call has ended well: what was computed is stored on all ranks."""
        self._stored |= self._computing
        self._computing.clear()

    def lost(self, call: ModelCall) -> bool:
        """Workers were lost: nothing is stored everywhere. True if `call` was to reuse some."""
        self._computing.clear()
        self._stored.clear()
        early = self.take_early(call)
        if not any(early):
            self._early = [(call.index, reuse) for reuse in early]
        return any(early)

    def alone(self, call: ModelCall) -> None:
        """This call runs on rank 0 only: its key's residuals are no longer everywhere."""
        self._early = [one for one in self._early if one[0] != call.index]
        self._computing.discard(call.key)
        self._stored.discard(call.key)

    def failed(self) -> None:
        """A shared call has failed: nothing is stored everywhere."""
        self._early.clear()
        self._computing.clear()
        self._stored.clear()


def attach(state: Any, decisions: Decisions) -> None:
    """Let `decisions` overrule the block cache of a run (backends.cache.CacheState)."""
    state.mechanism.decisions.decider = decisions.decide
