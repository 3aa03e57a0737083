"""Run: one sampling run, from OUTER_SAMPLE to its end.

The Run is the only place that counts steps and evaluations and that keeps state between model
calls. It travels in the guider's own copy of `transformer_options`, so nothing survives on the
MODEL but a log of finished runs without tensors. Techniques are attached with `attach` and get
one state object per run (`Technique.start`), which is closed when the run ends, however it ends.

Order of ComfyUI's hooks (0.33): outer_sample > predict_noise (one evaluation) > apply_model.
"""

import itertools
import logging
import os
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch

from . import compiler, conflicts, host
from .calls import CALL, RUN, BranchKey, ModelCall, call_options, with_options
from .frame_room import with_room
from .memory.watch import MemoryWatch
from .position import Position, position_of
from .report import RunRecord, Section, fingerprint

TECHNIQUES = "slipstream"  # transformer_options key: technique name -> Technique
# Wrappers of one kind run in this order, inside other packs': what comes later hooks in on top of
# what came before (a reused block must not reach offload's hook), whichever node came first.
WRAPPER_ORDER = (
    "slipstream.parallel",
    "slipstream.offload",
    "slipstream.attention",
    "slipstream.cache",
)
LOG = "slipstream.log"  # attachment: RunLog, shared by the clones of a patched MODEL

log = logging.getLogger("slipstream")
_run_ids = itertools.count(1)


@runtime_checkable
class State(Protocol):
    """What one technique keeps for one run.

    With an attribute `keeps_tensors` that is true: also tensors made inside the network's forward.
    """

    def section(self) -> Section:
        """The technique's part of the report; called once, when sampling is over."""

    def close(self) -> None:
        """Drop every tensor and hook; called also after an exception or an interrupt."""


@runtime_checkable
class Keeps(Protocol):
    """A State that keeps tensors between model calls."""

    def forget(self) -> None:
        """Drop what was kept: the latest evaluation is void and will be computed again."""


class Technique(Protocol):
    """An immutable configuration that was attached to a MODEL."""

    @property
    def name(self) -> str: ...

    def start(self, run: "Run") -> State: ...


@dataclass
class RunLog:
    """The records of the latest runs of a patched MODEL and its clones; no tensors."""

    records: deque[RunRecord] = field(default_factory=lambda: deque(maxlen=32))

    def add(self, record: RunRecord) -> None:
        self.records.append(record)

    def latest(self) -> RunRecord | None:
        return self.records[-1] if self.records else None

    def of_latent(self, samples: torch.Tensor) -> RunRecord | None:
        """The newest record whose result is `samples`, or None (edited latent, other model)."""
        print_ = fingerprint(samples)
        return next((r for r in reversed(self.records) if r.made(print_)), None)


class Run:
    """One sampling run: sigmas, step, evaluation, branch keys, technique states, notes."""

    def __init__(self, patcher: Any, sigmas: torch.Tensor, techniques: dict[str, Technique]):
        self.id = next(_run_ids)
        self.patcher = patcher
        self.sigmas: tuple[float, ...] = tuple(float(s) for s in sigmas)
        self.step = self.evaluation = -1
        self.num_calls = 0
        self.sigma = float("nan")
        self.is_complete = False  # sampling has ended with a result
        self.notes: dict[str, int] = {}  # sentence -> how often
        self.states: dict[str, State] = {}
        self.memory: MemoryWatch | None = None  # of every run, whatever is attached
        self.disabled = tuple(n for n in techniques if n in disabled_techniques())
        self._techniques = {n: t for n, t in techniques.items() if n not in self.disabled}
        self._occurrences: dict[tuple[Any, ...], int] = {}  # (uuids, window) -> calls
        self._lock = threading.Lock()  # core's MultiGPU CFG split calls the model from threads
        self._started = time.perf_counter()
        self._sampling: float | None = None  # when the first evaluation began

    @property
    def num_steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    @cached_property
    def position(self) -> Position:
        """Where this run's steps lie in the whole schedule (a sampler may do only a part)."""
        return position_of(self.sigmas, host.percent_to_sigma(self.patcher))

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.num_steps - 1

    def start(self) -> None:
        """Check conflicts, then start every technique in the order it was attached."""
        conflicts.check(self._techniques.keys() | host.features(self.patcher))
        self.memory = MemoryWatch(self.patcher, is_first=self.id == 1)
        for name in self.disabled:
            self.note(f"{name} is off: SLIPSTREAM_DISABLE names it")
        for name, technique in self._techniques.items():
            self.states[name] = technique.start(self)
        self.states["memory"] = self.memory

    def undisturbed(self, options: dict[str, Any]) -> AbstractContextManager[None]:
        """Around the sampling of this run; `options`: its transformer_options."""
        keepers = [n for n, state in self.states.items() if getattr(state, "keeps_tensors", False)]
        network, device = host.diffusion_model(self.patcher), self.patcher.load_device
        return compiler.undisturbed(keepers, network, options, device, self.note)

    def note(self, sentence: str) -> None:
        """Record something the user should know; logged the first time, counted after."""
        count = self.notes.get(sentence, 0)
        self.notes[sentence] = count + 1
        if count == 0:
            log.info("%s", sentence)

    def begin_evaluation(self, sigma: float) -> None:
        """One PREDICT_NOISE. `step` is the last one whose sigma is not below `sigma`."""
        self._sampling = self._sampling or time.perf_counter()
        self.evaluation += 1
        self.sigma = sigma
        self.step = step_of(sigma, self.sigmas)
        with self._lock:
            self._occurrences.clear()

    def repeat_evaluation(self) -> None:
        """The latest evaluation is void: it is computed again, without anything kept from it."""
        for state in self.states.values():
            if isinstance(state, Keeps):
                state.forget()
        self.begin_evaluation(self.sigma)

    def begin_call(self, options: dict[str, Any]) -> ModelCall:
        """A ModelCall for one APPLY_MODEL with these transformer_options."""
        uuids = tuple(options.get("uuids") or ())
        window = _frames(getattr(options.get("context_window"), "index_list", None))
        with self._lock:
            occurrence = self._occurrences.get((uuids, window), 0)
            self._occurrences[uuids, window] = occurrence + 1
            index = self.num_calls
            self.num_calls += 1
        return ModelCall(
            index=index,
            step=self.step,
            evaluation=self.evaluation,
            key=BranchKey(uuids, occurrence, window),
            cond_or_uncond=tuple(options.get("cond_or_uncond") or ()),
        )

    def finish(self, samples: torch.Tensor | None) -> RunRecord:
        """The record of this run. `samples`: what OUTER_SAMPLE returned, None if it raised."""
        if samples is not None and not _is_finite(samples):
            self.note("The result contains NaN or infinite values: the picture will be black")
        self.is_complete = samples is not None
        sections = {name: state.section() for name, state in self.states.items()}
        return RunRecord(
            id=self.id,
            num_steps=self.num_steps,
            num_evaluations=self.evaluation + 1,
            num_calls=self.num_calls,
            seconds=time.perf_counter() - self._started,
            loading_s=(self._sampling or time.perf_counter()) - self._started,
            device=str(getattr(self.patcher, "load_device", "cpu")),
            model=type(host.diffusion_model(self.patcher)).__name__,
            versions=host.versions(),
            completed=self.is_complete,
            notes=dict(self.notes),
            sections=sections,
            result=fingerprint(samples) if samples is not None else (),
        )

    def close(self) -> None:
        """Close every state; the first error is raised after all were closed."""
        errors = []
        for state in self.states.values():
            try:
                state.close()
            except Exception as error:  # noqa: BLE001 - raised below, all others closed
                errors.append(error)
        self.states.clear()
        self.patcher = None
        if errors:
            raise errors[0]


def step_of(sigma: float, sigmas: tuple[float, ...]) -> int:
    """Index of the step that evaluates at `sigma`, 0 .. len(sigmas) - 2.

    Sigmas fall over a run; a second evaluation between two of them (heun, SDE) belongs to the
    step whose sigma is the nearest at or above it.
    """
    last = max(len(sigmas) - 2, 0)
    tolerance = 1e-4 * max(abs(sigma), 1e-6)
    for index in range(last, 0, -1):
        if sigmas[index] + tolerance >= sigma:
            return index
    return 0


def disabled_techniques() -> set[str]:
    """Names in SLIPSTREAM_DISABLE, a comma-separated list."""
    return {n.strip() for n in os.environ.get("SLIPSTREAM_DISABLE", "").split(",") if n.strip()}


def current(options: dict[str, Any] | None) -> Run | None:
    """The Run that these transformer_options belong to, if any."""
    return options.get(RUN) if options else None


def attach(patcher: Any, technique: Technique) -> None:
    """Put `technique` on `patcher` (a clone of the caller's), replacing an earlier one."""
    options = patcher.model_options.setdefault("transformer_options", {})
    options.setdefault(TECHNIQUES, {})[technique.name] = technique
    if patcher.get_attachment(LOG) is None:
        patcher.set_attachments(LOG, RunLog())
    # Added once and never moved: wrappers run in the order of their keys, ours around the others'.
    for kind, wrapper in (
        ("outer_sample", outer_sample),
        ("predict_noise", predict_noise),
        ("apply_model", apply_model),
    ):
        if not patcher.get_wrappers(kind, RUN):
            patcher.add_wrapper_with_key(kind, RUN, wrapper)


def attached(patcher: Any) -> dict[str, Technique]:
    """Technique name -> Technique of a patched MODEL."""
    return dict(patcher.model_options.get("transformer_options", {}).get(TECHNIQUES, {}))


def run_log(patcher: Any) -> RunLog | None:
    """The log of a patched MODEL, or None if none of our techniques is on it."""
    return patcher.get_attachment(LOG)


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: makes the Run, and ends it whatever happens."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # the guider's copy for this sample()
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    run = Run(guider.model_patcher, sigmas, options.get(TECHNIQUES, {}))
    options[RUN] = run
    _order_wrappers(options)
    run_records = guider.model_patcher.get_attachment(LOG)
    samples = None
    try:
        run.start()
        with run.undisturbed(options):
            samples = with_room(partial(executor, *args, **kwargs))
        return samples
    finally:
        options.pop(RUN, None)
        try:
            record = run.finish(samples)
            if run_records is not None:
                run_records.add(record)
            if record.num_evaluations:
                log.info("%s", record.summary())
        finally:
            run.close()


def _order_wrappers(options: dict[str, Any]) -> None:
    """Put our techniques' wrappers into WRAPPER_ORDER, behind all others of their kind."""
    for by_key in options.get("wrappers", {}).values():
        for key in WRAPPER_ORDER:
            if key in by_key:
                by_key[key] = by_key.pop(key)


def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """PREDICT_NOISE wrapper: one evaluation."""
    run = current(executor.class_obj.model_options.get("transformer_options"))
    if run is not None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        run.begin_evaluation(float(timestep.flatten()[0]))
    return executor(*args, **kwargs)


def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL wrapper: numbers the model call and puts it into the call's own options."""
    options = call_options(args, kwargs)
    run = current(options)
    if run is None:
        return executor(*args, **kwargs)
    assert options is not None
    call = run.begin_call(options)
    new_args, new_kwargs = with_options(args, kwargs, {**options, CALL: call})
    if run.memory is None:
        return executor(*new_args, **new_kwargs)
    run.memory.before_call()
    try:
        return executor(*new_args, **new_kwargs)
    finally:
        run.memory.after_call()


def _frames(window: Any) -> tuple[int, ...] | None:
    return None if window is None else tuple(window)


def _is_finite(samples: torch.Tensor) -> bool:
    return bool(torch.isfinite(samples).all())
