"""What a run shares: a MODEL that workers can have, and which calls of a network cannot be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.architectures.tokens import TokenPlan
from ..backends.attention.override import Override
from .crew import Setting
from .pool import Model, Pool

OVERRIDE = "optimized_attention_override"


class Alone(Exception):  # noqa: N818 - no error: the call runs on one device
    """This call cannot be shared."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class BeginAgain(Exception):  # noqa: N818 - no error
    """What a block cache decided for this call cannot be done: its APPLY_MODEL must run again.

    reason: why it must be on rank 0 alone; "" if it may be shared.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Shared:
    """A MODEL that workers can have.

    plan: None where tokens cannot be shared, which `no_plan` says; one_lane: the sentence for a
    network whose rows are shared by nobody, or ""; meanwhile: raises when the user interrupts;
    memory_bytes: of a call on a latent of a shape; busy_devices: those that this process's own
    models use; tell: shows a sentence on the node that runs.
    """

    pool: Pool
    devices: tuple[str, ...]
    device: torch.device
    setting: Setting
    model: Model
    network: torch.nn.Module
    plan: TokenPlan | None
    num_heads: int | None
    techniques: dict[str, dict[str, Any]]
    meanwhile: Callable[[], None]
    memory_bytes: Callable[[Sequence[int]], int]
    busy_devices: Callable[[], Sequence[str]] = tuple
    tell: Callable[[str], None] = lambda sentence: None
    no_plan: str = ""
    one_lane: str = ""

    def refusal(self, network: torch.nn.Module, options: Mapping[str, Any]) -> str | None:
        """Why no call of `network` with these transformer_options can be shared, or None."""
        if network is not self.network:
            return "the network of another MODEL"
        for kind in ("patches", "patches_replace"):
            names = sorted(n for n, found in (options.get(kind) or {}).items() if found)
            if names:
                return f"patches of the model's blocks ({', '.join(names)}) cannot travel"
        override = options.get(OVERRIDE)
        if isinstance(override, Override):
            override = override.previous
        if override is not None:
            return "an attention override cannot travel: use SlipstreamAttention instead"
        return None
