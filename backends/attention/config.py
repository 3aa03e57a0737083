"""AttentionConfig: which kernels may answer, when, and how they are checked."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SlipstreamError
from .frozen import problem_with
from .kernels.table import KERNELS

AUTO = -1  # dense steps: one at either end, none in schedules of fewer than ten steps
POLICIES = ("exact", "balanced", "fastest", "manual")
BACKENDS = ("auto", *KERNELS)


class AttentionError(SlipstreamError, ValueError):
    """A mistake in the attention node's settings, or a call that `strict` does not let pass."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings of one attention application.

    policy: which kernels may be tried; backend: the one kernel of policy manual; strict: a call
    that must fall back is an error; dense_first_steps, dense_last_steps, dense_blocks: where
    only exact kernels run (steps of the whole schedule, AUTO: see there; blocks are counted over
    all stacks, in the order they run); min_tokens: shorter calls stay exact; probe: check accuracy
    against fp32 on the model's own q, k, v; autotune: time the candidates; max_rel_l1, min_cos:
    what the probe lets pass (docs/benchmarks/quality.md, "Attention", has pictures of the demo
    model at such errors); freeze: name or JSON of a kernel plan to repeat (frozen.py); retune:
    measure and check as if for the first time. Raises AttentionError with a sentence.
    """

    policy: str = "balanced"
    backend: str = "auto"
    strict: bool = False
    dense_first_steps: int = AUTO
    dense_last_steps: int = AUTO
    dense_blocks: str = ""
    min_tokens: int = 1024
    probe: bool = True
    autotune: bool = True
    max_rel_l1: float = 0.05
    min_cos: float = 0.995
    freeze: str = ""
    retune: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise AttentionError(
                f"Policy '{self.policy}' is not one of {', '.join(POLICIES)}: choose one of them."
            )
        if self.backend not in BACKENDS:
            raise AttentionError(
                f"Backend '{self.backend}' is not known: choose one of {', '.join(BACKENDS)}."
            )
        if self.policy == "manual" and self.backend == "auto":
            raise AttentionError(
                "Policy 'manual' needs a kernel in 'backend': choose one, "
                "or set policy to 'balanced'."
            )
        for name in ("dense_first_steps", "dense_last_steps"):
            if getattr(self, name) < AUTO:
                raise AttentionError(
                    f"{name} must be 0 or more, or -1 for automatic; got {getattr(self, name)}."
                )
        if self.min_tokens < 0:
            raise AttentionError(f"min_tokens must be 0 or more; got {self.min_tokens}.")
        if not self.max_rel_l1 >= 0:
            raise AttentionError(f"max_rel_l1 must be 0 or more; got {self.max_rel_l1}.")
        if not -1 <= self.min_cos <= 1:
            raise AttentionError(f"min_cos must be between -1 and 1; got {self.min_cos}.")
        parse_blocks(self.dense_blocks)
        problem = problem_with(self.freeze)
        if problem is not None:
            raise AttentionError(problem)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_blocks(text: str) -> frozenset[int]:
    """Block numbers of '0, 1, 47-49'; raises AttentionError for anything else."""
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(g) if g else None for g in match.groups()) if match else (None, None)
        if first is None or (last is not None and last < first):
            raise AttentionError(
                f"dense_blocks takes numbers and ranges such as '0, 1, 47-49'; got '{part}'."
            )
        found.update(range(first, (first if last is None else last) + 1))
    return frozenset(found)
