"""A lane's part of a call: handed over at once, its result fetched when this process wants it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .bundle import send_bundle
from .mesh import Links
from .messages import Failed, Forward
from .wire import Meta, decode
from .workers import Meanwhile, Worker, collect, failure


def hand_over(
    links: Links,
    lane: int,
    members: Sequence[Worker],
    message: Forward,
    tensors: Sequence[torch.Tensor],
) -> "Ticket":
    """Give the lane's workers a call and its tensors; they begin as soon as they have them."""
    for worker in members:
        worker.send(message)
    with links.clock.measure("broadcast"):
        send_bundle(links.entry(lane), tensors)
    return Ticket(links, lane, members)


class Ticket:
    """A lane's part of a call, handed over."""

    def __init__(self, links: Links, lane: int, members: Sequence[Worker]):
        self._links, self._lane, self._members = links, lane, members

    def result(
        self,
        *,
        timeout_s: float,
        waiting: AbstractContextManager[None] | None = None,
        meanwhile: Meanwhile = None,
    ) -> tuple[Any, float | None]:
        """The lane's output, and its seconds where it was timed; None for this process's own lane.

        With `waiting`, the answer is waited for inside it and without end, and `meanwhile` raises
        to give up. Raises WorkerError, or as Worker.answer does.
        """
        if self._lane == self._links.own_lane:
            collect(self._members, timeout_s=timeout_s)
            return None, None
        leader, *others = self._members
        with waiting or nullcontext():
            answer = leader.answer(None if waiting else timeout_s, meanwhile=meanwhile)
        if isinstance(answer, Failed):
            raise failure(leader, answer)
        received = []
        for found in answer.facts["metas"]:
            meta = Meta.from_json(found)
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=self._links.clock.device)
            self._links.entry(self._lane).recv(tensor, source=1)
            received.append(tensor)
        collect(others, timeout_s=timeout_s)
        out = decode(answer.facts["out"], received, device=self._links.clock.device)
        return out, answer.facts["seconds"]
