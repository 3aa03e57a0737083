"""Strategy output: reuse the whole model's prediction, for networks whose blocks are not known.

At APPLY_MODEL, outside whatever is compiled. What is kept is (denoised - x) / sigma: the velocity
of a flow model, the noise of an eps or v model. A reused call returns x + sigma * what follows from
it, a new tensor; the sampler's latent is never written to. The change is estimated from the input,
as in EasyCache (arXiv 2507.02860): by the rate of output to input change at the computed calls.
"""

from collections.abc import Hashable
from typing import Any

import torch

from ..calls import CALL, ModelCall
from ..compiler import unrecorded
from .builtin import BuiltinEngine
from .config import CacheConfig
from .decisions import Event, branch_name
from .engine import Answer, Streams, limit_reached
from .mechanism import Deciding

_SAMPLES = 1 << 16  # elements of the input that are compared


class OutputEngine(BuiltinEngine):
    """Estimates the relative change of the output since the last computed call."""

    def __init__(self, config: CacheConfig):
        super().__init__(config)
        self._rates: dict[Hashable, float] = {}
        self._previous: dict[Hashable, torch.Tensor] = {}  # inputs, one computed call back

    def ask(self, key: Hashable, metric: torch.Tensor | None) -> Answer:
        branch = self._branches[key]
        limit = limit_reached(
            self._config,
            num_cached=branch.num_cached,
            streak=branch.streak,
            accumulated=branch.accumulated,
        )
        if limit is not None:
            return Answer(False, None, limit)
        if metric is None or branch.front is None or key not in self._rates:
            return Answer(False, None, "no metric")
        moved = (metric - branch.front).abs().mean().item()
        size = branch.series[0].latest.abs().mean().item()
        diff = self._rates[key] * moved / max(size, 1e-12)
        branch.accumulated += diff
        reuse = diff < self._config.residual_diff_threshold
        return Answer(reuse, diff, "below threshold" if reuse else "above threshold")

    def observe(self, key: Hashable, reuse: bool, metric: torch.Tensor) -> None:
        branch = self._branches[key]
        if not reuse:
            if branch.front is not None:
                self._previous[key] = branch.front
            branch.front = metric

    def store(self, key: Hashable, residual: Streams) -> None:
        branch = self._branches[key]
        if key in self._previous and branch.series and branch.front is not None:
            moved = (branch.front - self._previous.pop(key)).abs().mean().item()
            change = (residual[0] - branch.series[0].latest).abs().mean().item()
            if moved > 0:
                self._rates[key] = change / moved
        super().store(key, residual)

    def drop(self, key: Hashable) -> None:
        super().drop(key)
        self._rates.pop(key, None)
        self._previous.pop(key, None)

    def close(self) -> None:
        super().close()
        self._previous.clear()


class OutputCache(Deciding):
    """The mechanism: whole model calls are computed or reused."""

    hook = "apply_model"
    unit = "model calls"

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """An APPLY_MODEL call: the denoised latent, computed or from the kept prediction."""
        call: ModelCall = options[CALL]
        x, t = args[0], args[1]
        sigma = t.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        signature = (x.shape, x.dtype, x.device)
        with unrecorded():
            metric = x.flatten()[:: max(1, x.numel() // _SAMPLES)].clone()
        decision = self.decisions.begin(call, signature)
        if decision is None:
            decision = self.decisions.ask(call, metric)
        if self.decisions.wants_metric(call):
            self.decisions.observe(call, decision.reuse, metric)
        self.events.append(
            Event(call.step, call.evaluation, branch_name(call), decision,
                  0 if decision.reuse else 1, 1 if decision.reuse else 0)
        )  # fmt: skip
        if decision.reuse:
            return x + sigma * self.decisions.predict(call)[0]
        denoised = executor(*args, **kwargs)
        if bool((t > 0).all()):
            with unrecorded():
                self.decisions.store(call, ((denoised - x) / sigma,), signature)
        return denoised
