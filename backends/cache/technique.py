"""CacheTechnique: an immutable config on a MODEL, and what it starts for every run."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..report import Section
from ..run import Run
from .config import CacheConfig
from .decisions import Decider
from .mechanism import Mechanism
from .section import section, zero_reuse_sentence
from .strategy import WHOLE_CALL_STRATEGIES, choose, look_at, make_mechanism, settle

NAME = "cache"
_NO_THRESHOLD = ("scm", "deepcache", "pab", "fastercache-cfg")


@dataclass(frozen=True)
class CacheTechnique:
    """config: what the node was set to; decider: overrules decisions (sequence parallel);
    notes: sentences for the report of every run."""

    config: CacheConfig
    decider: Decider | None = None
    notes: tuple[str, ...] = ()

    name = NAME

    def start(self, run: Run) -> "CacheState":
        """Raises ValueError, with one sentence, if this run cannot be cached as asked."""
        for note in self.notes:
            run.note(note)
        return CacheState(run, self.config, self.decider)


class CacheState:
    """The cache of one run: the mechanism, and its report at the end."""

    def __init__(self, run: Run, config: CacheConfig, decider: Decider | None):
        self._run = run
        model = look_at(run)
        strategy = choose(config, model, run.num_steps)
        self.config = settle(config, strategy, model, run)
        self.mechanism: Mechanism = make_mechanism(self.config, strategy, model, run, decider)
        if config.strategy == "auto" and strategy == "output":
            why = "torch.compile made it one graph" if model.is_compiled else "no block stack known"
            run.note(f"Cache strategy output for {model.name}: {why}")

    @property
    def keeps_tensors(self) -> bool:
        """Whether they are made inside the network's forward: see Run.undisturbed."""
        return self.config.strategy not in WHOLE_CALL_STRATEGIES

    def call(
        self, kind: str, executor: Any, args: Any, kwargs: dict[str, Any], options: Any
    ) -> Any:
        """One wrapped call of `kind`: the mechanism's, if it works there."""
        if kind != self.mechanism.hook or torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        return self.mechanism.call(executor, args, kwargs, options)

    def section(self) -> Section:
        mechanism, config, run = self.mechanism, self.config, self._run
        decisions = mechanism.decisions
        engine = "builtin" if decisions is None else decisions.engine.label
        compares = config.strategy not in _NO_THRESHOLD and not (
            decisions is not None and decisions.schedule.num_asked == 0
        )
        threshold = config.residual_diff_threshold if compares else None
        if config.calibrator != "none" and decisions is not None and not decisions.is_monotone:
            run.note(
                f"{config.calibrator} repeated residuals instead of extrapolating: "
                "this sampler's sigmas repeat or rise"
            )
        num_open = run.num_steps if decisions is None else decisions.schedule.num_open
        warning = zero_reuse_sentence(config.strategy, mechanism.events, threshold, num_open)
        if warning is not None:
            run.note(warning)
        elif run.num_calls and not mechanism.events:
            run.note(f"{config.strategy} never saw a call it could work on: nothing reused")
        return section(
            strategy=config.strategy,
            engine=engine,
            unit=mechanism.unit,
            events=mechanism.events,
            layers=mechanism.layers,
            threshold=threshold,
            peak_bytes=mechanism.peak_bytes,
            num_evaluations=run.evaluation + 1,
            settings=asdict(config),
        )

    def forget(self) -> None:
        """Nothing is kept any more; the run goes on, and what comes is kept anew."""
        self.mechanism.close()

    def close(self) -> None:
        self.mechanism.close()
