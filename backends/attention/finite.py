"""NaN after the first call: an evaluation whose result is not finite is computed again.

One look at the latent that comes out of an evaluation finds NaN from any layer: it spreads through
the layers behind. The look waits for the device where the run waits anyway, since the next
evaluation begins with reading its sigma. In the repetition every kernel's answer is looked at, and
the layers whose kernel is to blame stay with ComfyUI's attention for the rest of the run.
"""

from collections.abc import Callable

import torch

from ..run import Run

FROM_MODEL = (
    "NaN or infinite values with ComfyUI's own attention too: they come from the model, not from "
    "an attention kernel"
)


class FiniteCheck:
    """One run's. is_looking: every kernel's answer is to be looked at."""

    def __init__(self, run: Run):
        self._run = run
        self._culprits: list[str] = []
        self._is_over = False
        self.is_looking = False

    def blame(self, sentence: str) -> None:
        """A kernel's answer was not finite where ComfyUI's is."""
        self._culprits.append(sentence)

    def checked(self, out: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`out`, what compute() gave; computed once more if it is not finite."""
        if self._is_over or bool(torch.isfinite(out).all()):
            return out
        self._culprits.clear()
        self._run.repeat_evaluation()
        self.is_looking = True
        try:
            out = compute()
        finally:
            self.is_looking = False
        if self._culprits:
            named = self._culprits[0]
            more = f" and {len(self._culprits) - 1} more layers" if self._culprits[1:] else ""
            self._run.note(
                f"{named}{more}: step {self._run.step} was computed again with ComfyUI's attention "
                "there"
            )
        if not bool(torch.isfinite(out).all()):
            self._run.note(FROM_MODEL)
            self._is_over = True
        return out
