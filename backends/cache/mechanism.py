"""What acts in the model calls of one run: the protocol, and what most mechanisms share."""

from typing import Any, Protocol

from .decisions import Decisions, Event


class Mechanism(Protocol):
    """One strategy at work. Its events and layers are the report's."""

    hook: str  # diffusion_model, apply_model or calc_cond_batch: the wrapper it works in
    unit: str  # what its events count as blocks
    events: list[Event]
    layers: dict[tuple[str, int], bool]  # (layer, evaluation) -> reused, if it works by layers

    @property
    def decisions(self) -> Decisions | None:
        """None: the schedule alone decides."""

    @property
    def peak_bytes(self) -> int: ...

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """The wrapped call: executor(*args, **kwargs), or something instead of it."""

    def close(self) -> None:
        """Drop every tensor."""


class Deciding:
    """A mechanism whose engine decides: events, peak and end."""

    def __init__(self, decisions: Decisions):
        self.decisions = decisions
        self.events: list[Event] = []
        self.layers: dict[tuple[str, int], bool] = {}

    @property
    def peak_bytes(self) -> int:
        return self.decisions.peak_bytes

    def close(self) -> None:
        self.decisions.close()
