"""What the attention of a run reports: JSON, lines, and kernel per layer and step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import Grid, Section
from .config import AttentionConfig
from .defaults import APPROXIMATE, EXACT, UNKNOWN
from .entry import DEFAULT, Entry, reasons_of
from .policy import SCHEDULED_STEP
from .request import BlockKey

NOT_REACHED = "This model's attention does not pass through ComfyUI's hook; nothing changed"
COMPILED = (
    "The model was compiled by torch.compile before this node was on it: "
    "its graph never calls the node; compile after it"
)
DISPLACED = (
    "{} was put over this node's attention, so it never saw a call: "
    "put Slipstream Attention behind that node"
)
_MOST_REASONS = 6
# Of several true reasons, those of a machine without the package say least about this run.
_LEAST_TELLING = ("is not installed", "needs a CUDA", "cannot be imported")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run's attention came to.

    displaced_by: an override that was put on top of ours; schedule: which steps were exact, in
    words; plan: kernel per call, to be frozen; remarks: sentences.
    """

    config: AttentionConfig
    entries: Mapping[Any, Entry]
    num_steps: int
    num_model_calls: int
    num_attention_calls: int
    is_compiled: bool
    displaced_by: str | None = None
    schedule: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def section_of(state: Outcome) -> Section:
    """The report of one run's attention."""
    entries = state.entries
    calls: Counter[str] = Counter()
    for entry in entries.values():
        for kernel_id, count in entry.answers.items():
            calls[_shown(kernel_id, entry)] += count
    reasons = reasons_of(entries)
    if state.num_model_calls and not state.num_attention_calls:
        reasons[_unseen(state)] = state.num_model_calls
    reasons.update(dict.fromkeys(state.remarks, 1))
    json = {
        "policy": state.config.policy,
        "backend": state.config.backend,
        "label": label_of(entries.values()),
        "calls": dict(calls.most_common()),
        "schedule": state.schedule,
        "reasons": dict(sorted(reasons.items(), key=_by_weight)),
        "layers": layers_of(entries),
        "speedup_vs_exact": speedup_vs_exact(list(entries.values())),
        "config": state.config.to_json(),
        "plan": dict(state.plan),
    }
    return Section(json, _lines(state.config.policy, json), (_grid(state),) if entries else ())


def label_of(entries: Any) -> str:
    """EXACT only if every answer was; UNKNOWN if nothing says that one was not."""
    found = {EXACT}
    for entry in entries:
        if entry.used_approximate:
            found.add(APPROXIMATE)
        if entry.answers.get(DEFAULT):
            found.add(entry.default_accuracy)
    return next(label for label in (APPROXIMATE, UNKNOWN, EXACT) if label in found)


def _unseen(state: Outcome) -> str:
    """Why no call of the run's attention reached the node."""
    if state.displaced_by is not None:
        return DISPLACED.format(state.displaced_by)
    return COMPILED if state.is_compiled else NOT_REACHED


def _by_weight(item: tuple[str, int]) -> tuple[bool, int]:
    sentence, count = item
    return any(words in sentence for words in _LEAST_TELLING), -count


def speedup_vs_exact(entries: list[Entry]) -> float | None:
    """Attention time with exact kernels over the time with those chosen; None if not timed."""
    timed = [e for e in entries if e.chosen_ms and e.exact_ms]
    chosen = sum(e.calls * (e.chosen_ms or 0.0) for e in timed)
    exact = sum(e.calls * (e.exact_ms or 0.0) for e in timed)
    return round(exact / chosen, 3) if chosen else None


def layers_of(entries: Mapping[Any, Entry]) -> list[dict[str, Any]]:
    """One object per block and call: what answered it most, its error, its size."""
    by_block: dict[BlockKey, list[Entry]] = {}
    for entry in entries.values():
        by_block.setdefault(entry.block, []).append(entry)
    layers = []
    for block, group in by_block.items():
        answers: Counter[str] = Counter()
        for entry in group:
            answers.update({_shown(k, entry): n for k, n in entry.answers.items()})
        verdicts = [e.verdict for e in group if e.verdict is not None]
        worst = max(verdicts, key=lambda v: v.rel_l1, default=None)
        layers.append(
            {
                "block": str(block),
                "kernels": dict(answers.most_common()),
                "tokens": max(e.request.q_tokens for e in group),
                "rel_l1": None if worst is None else round(worst.rel_l1, 6),
                "cosine": None if worst is None else round(worst.cosine, 6),
            }
        )
    return layers


def _shown(kernel_id: str, entry: Entry) -> str:
    """What answered where no kernel of ours did by its name: 'comfyui:pytorch'."""
    if kernel_id != DEFAULT:
        return kernel_id
    name = entry.default_name
    return name if "." in name else f"comfyui:{name}"


def _lines(policy: str, json: dict[str, Any]) -> tuple[str, ...]:
    total = sum(json["calls"].values())
    shares = ", ".join(f"{name} {count}" for name, count in json["calls"].items())
    line = f"Attention ({policy}): {total} calls: {shares}" if total else f"Attention ({policy})"
    if json["speedup_vs_exact"]:
        line += f"; {json['speedup_vs_exact']:.2f}x the exact kernels' speed by timing"
    if json["schedule"]:
        line += f"; {json['schedule']}"
    told = [(s, n) for s, n in json["reasons"].items() if s != SCHEDULED_STEP]
    return (line, *(f"  {sentence} ({n} calls)" for sentence, n in told[:_MOST_REASONS]))


def _grid(state: Outcome) -> Grid:
    """Rows: blocks and their calls in the order they ran; columns: steps."""
    num_steps = state.num_steps
    rows: dict[str, list[str | None]] = {}
    legend: dict[str, str] = {}
    for entry in state.entries.values():
        row = rows.setdefault(str(entry.block), [None] * num_steps)
        for step, kernel_id in entry.steps:
            shown = _shown(kernel_id, entry)
            legend.setdefault(shown, shown)
            if 0 <= step < num_steps and (row[step] is None or kernel_id != DEFAULT):
                row[step] = shown
    return Grid(
        title="Attention kernel per layer and step",
        row_labels=tuple(rows),
        column_labels=tuple(str(i) for i in range(num_steps)),
        cells=tuple(tuple(row) for row in rows.values()),
        legend=legend,
    )
