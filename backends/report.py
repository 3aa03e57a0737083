"""From finished runs to text and JSON (schema 1); figures are described here, drawn in picture/.

A technique contributes a Section. A technique that is not on the MODEL is absent from the JSON.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

SCHEMA = 1
NO_TECHNIQUE = (
    "No Slipstream node is on this MODEL: connect the MODEL that the sampler used, "
    "behind the Slipstream nodes."
)
NO_RUN = "This MODEL has not been sampled yet: connect the LATENT that its sampler made."
OTHER_LATENT = (
    "The latent matches no recorded run of this MODEL (it was changed after sampling, or another "
    "MODEL made it): this is the latest run."
)
_NUM_PROBES = 64


@dataclass(frozen=True)
class Grid:
    """Rows x columns of categories: what each layer (row) did in each step (column).

    cells[row][column] is a key of `legend` or None (nothing happened there); legend maps a
    category to the words shown beside its colour, in order of importance. Row labels with a slash
    (double/3) are gathered by what stands before it. row, column: the words for one of each.
    """

    title: str
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    cells: tuple[tuple[str | None, ...], ...]
    legend: dict[str, str]
    row: str = "layer"
    column: str = "step"


@dataclass(frozen=True)
class Curve:
    """A value per evaluation with the threshold it was held against; `marks` are reused ones."""

    title: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    threshold: float | None
    marks: tuple[bool, ...]


@dataclass(frozen=True)
class Section:
    """One technique's part of a report: its JSON object, its lines of text, its figures."""

    json: dict[str, Any]
    lines: tuple[str, ...] = ()
    figures: tuple[Grid | Curve, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished sampling run. Holds no tensors, so it may outlive the run.

    seconds: of the whole run; loading_s: of them, before the first evaluation.
    """

    id: int
    num_steps: int
    num_evaluations: int
    num_calls: int
    seconds: float
    device: str
    model: str
    versions: dict[str, str]
    completed: bool
    notes: dict[str, int]
    sections: dict[str, Section]
    loading_s: float = 0.0
    result: tuple[float, ...] = field(repr=False, default=())

    def made(self, print_: Sequence[float]) -> bool:
        """Whether a latent with this fingerprint is the result of this run."""
        if not self.result or len(print_) != len(self.result):
            return False
        scale = max(max(abs(x) for x in self.result), 1e-6)
        # A latent may have been cast to 16 bits on its way (bf16 keeps 8 bits of mantissa).
        return all(abs(a - b) <= 0.01 * scale for a, b in zip(print_, self.result, strict=True))

    @property
    def step_s(self) -> float:
        """Seconds per step, without loading."""
        return (self.seconds - self.loading_s) / self.num_steps if self.num_steps else 0.0

    def summary(self) -> str:
        """One line for the log."""
        parts = [section.lines[0] for section in self.sections.values() if section.lines]
        run = f"run {self.id}: {self.num_steps} steps, {self.seconds:.2f} s"
        return "; ".join([f"Slipstream {run}", *parts])

    def to_json(self) -> dict[str, Any]:
        """The JSON contract, schema 1."""
        run = {
            "id": self.id,
            "steps": self.num_steps,
            "evaluations": self.num_evaluations,
            "model_calls": self.num_calls,
            "seconds": round(self.seconds, 4),
            "loading_seconds": round(self.loading_s, 4),
            "device": self.device,
            "model": self.model,
            "completed": self.completed,
            "versions": self.versions,
            "notes": self.notes,
        }
        sections = {name: section.json for name, section in self.sections.items()}
        return {"schema": SCHEMA, "run": run, **sections}

    def to_text(self) -> str:
        """A few lines that fit on a node."""
        ended = "" if self.completed else ", did not finish"
        head = (
            f"Run {self.id}: {self.model} on {self.device}, {self.num_steps} steps "
            f"({self.num_evaluations} evaluations), {self.seconds:.2f} s, "
            f"{self.step_s:.3f} s per step{ended}"
        )
        lines = [head]
        for section in self.sections.values():
            lines.extend(section.lines)
        lines.extend(note if n == 1 else f"{note} ({n} times)" for note, n in self.notes.items())
        return "\n".join(lines)


class Log(Protocol):
    """The runs of a MODEL, newest last (run.RunLog)."""

    def latest(self) -> RunRecord | None: ...

    def of_latent(self, samples: torch.Tensor) -> RunRecord | None: ...


@dataclass(frozen=True)
class Report:
    """What can be said about a latent and a MODEL: a run, a remark about the match, or both."""

    record: RunRecord | None
    remark: str = ""

    @property
    def text(self) -> str:
        parts = [self.remark, self.record.to_text() if self.record else ""]
        return "\n".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """The run's JSON contract; without a run, `run` is null. `remark` only if there is one."""
        json_ = self.record.to_json() if self.record else {"schema": SCHEMA, "run": None}
        return {**json_, "remark": self.remark} if self.remark else json_

    @property
    def json_text(self) -> str:
        """Indented JSON that any parser reads: NaN and infinities become null."""
        return json.dumps(_finite(self.to_json()), indent=2, ensure_ascii=False, allow_nan=False)


def report_on(log: Log | None, samples: torch.Tensor) -> Report:
    """The run in `log` that made `samples`, else the latest with a remark, else a sentence."""
    if log is None:
        return Report(None, NO_TECHNIQUE)
    record = log.of_latent(samples)
    if record is not None:
        return Report(record)
    latest = log.latest()
    return Report(latest, OTHER_LATENT) if latest else Report(None, NO_RUN)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(samples: torch.Tensor) -> tuple[float, ...]:
    """Evenly spaced values of a latent: enough to tell which run made it, after a cast too.

    samples: [B, ...] of any dtype, or ComfyUI's NestedTensor (parts are laid end to end, as
    ComfyUI packs them for sampling). NaN becomes 0.
    """
    parts = samples.unbind() if getattr(samples, "is_nested", False) else (samples,)
    flat = torch.cat([part.detach().flatten(1) for part in parts], 1).flatten()
    count = flat.numel()
    if count == 0:
        return ()
    num_probes = min(_NUM_PROBES, count)
    picks = torch.arange(num_probes, device=flat.device) * count // num_probes
    values = flat[picks].float().nan_to_num().cpu()
    return tuple(values.tolist())
