"""What is known about one kind of attention call in a run, and what answers without a kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .kernels.base import Kernel
from .layout import Views
from .probe import Verdict
from .request import BlockKey, Request

DEFAULT = "default"  # what answers where no kernel of ours does

OnViews = Callable[[Views], torch.Tensor]


@dataclass
class Entry:
    """What answers one kind of call. kernel None: ComfyUI's function (or an earlier patch)."""

    block: BlockKey
    request: Request
    kernel: Kernel | None = None
    is_dense: bool = False  # the schedule wants an exact kernel
    default_name: str = ""  # what answers where kernel is None
    default_accuracy: str = "exact"
    reasons: dict[str, str] = field(default_factory=dict)  # kernel id -> sentence
    verdict: Verdict | None = None
    answers: dict[str, int] = field(default_factory=dict)  # kernel id or DEFAULT -> calls
    used_approximate: bool = False  # an approximate kernel has answered
    probes: int = 0
    is_due: bool = False  # a second check in mid-run is still to come
    chosen_ms: float | None = None
    exact_ms: float | None = None
    refused: bool = False  # a kernel was wanted and none could take it
    steps: list[tuple[int, str]] = field(default_factory=list)  # (step, kernel id), one per step
    last_step: int = -1

    @property
    def calls(self) -> int:
        return sum(self.answers.values())


@dataclass(frozen=True)
class Fallback:
    """What answers a call that no kernel takes. run: it, on views; id: under which it is timed.

    may_stay: it is exact, or what the checkpoint itself asks for in this layer, so that nothing
    has to replace it where approximate kernels are not to be tried.
    """

    run: OnViews
    id: str = DEFAULT
    may_stay: bool = True


def answer_of(kernel: Kernel, views: Views) -> torch.Tensor:
    """The kernel's output [B,H,Nq,D]; raises what the kernel raises."""
    out = kernel.run(views.q, views.k, views.v, mask=views.mask, scale=views.scale)
    assert isinstance(out, torch.Tensor)
    return out


def reasons_of(entries: Mapping[object, Entry]) -> dict[str, int]:
    """Sentence -> number of calls it stood against, over all entries."""
    found: dict[str, int] = {}
    for entry in entries.values():
        for sentence in set(entry.reasons.values()):
            found[sentence] = found.get(sentence, 0) + entry.calls
    return found
