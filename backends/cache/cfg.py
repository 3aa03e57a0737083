"""The CFG half of FasterCache (arXiv 2410.19355): uncond from cond plus a kept difference.

At CALC_COND_BATCH: on the evaluations between two computed ones the uncond branch does not run.
FasterCache weighs the difference's low and high frequencies over time; this keeps it as it is.
"""

from typing import Any

from ..calls import BranchKey, ModelCall
from ..compiler import unrecorded
from ..run import Run
from .decisions import Decisions, Event
from .mechanism import Deciding


class CfgReuse(Deciding):
    """The mechanism: the second of two conds is computed or reconstructed."""

    hook = "calc_cond_batch"
    unit = "branches"

    def __init__(self, run: Run, decisions: Decisions):
        super().__init__(decisions)
        self._run = run
        self._evaluation = -1
        self._occurrences: dict[Any, int] = {}

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """A CALC_COND_BATCH call: (model, conds, x, timestep, model_options)."""
        model, conds, x, timestep, model_options = args
        if len(conds) != 2 or conds[0] is None or conds[1] is None:
            return executor(*args, **kwargs)
        call = self._call(conds, options)
        signature = (x.shape, x.dtype, x.device)
        decision = self.decisions.begin(call, signature) or self.decisions.ask(call, None)
        self.events.append(
            Event(call.step, call.evaluation, "uncond", decision,
                  1 if decision.reuse else 2, int(decision.reuse))
        )  # fmt: skip
        if decision.reuse:
            (difference,) = self.decisions.predict(call)
            cond = executor(model, [conds[0], None], x, timestep, model_options)[0]
            return [cond, cond + difference]
        cond, uncond = executor(*args, **kwargs)
        with unrecorded():
            self.decisions.store(call, (uncond - cond,), signature)
        return [cond, uncond]

    def _call(self, conds: Any, options: dict[str, Any]) -> ModelCall:
        """The pair's place in the run: both conds' uuids, occurrence and window."""
        if self._evaluation != self._run.evaluation:
            self._evaluation = self._run.evaluation
            self._occurrences.clear()
        uuids = tuple(c.get("uuid") for cond in conds for c in cond if isinstance(c, dict))
        window = getattr(options.get("context_window"), "index_list", None)
        frames = None if window is None else tuple(window)
        occurrence = self._occurrences.get((uuids, frames), 0)
        self._occurrences[uuids, frames] = occurrence + 1
        return ModelCall(
            index=-1,
            step=self._run.step,
            evaluation=self._run.evaluation,
            key=BranchKey(uuids, occurrence, frames),
            cond_or_uncond=(1,),
        )
