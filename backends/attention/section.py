"""What the attention of a run reports: JSON, lines, and kernel per layer and step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report import Grid, Section
from .config import AttentionConfig
from .plan import DEFAULT, Entry, reasons_of
from .request import BlockKey

NOT_REACHED = "This model's attention does not pass through ComfyUI's hook; nothing changed"
COMPILED = (
    "The model was compiled by torch.compile before this node was on it: "
    "its graph never calls the node; compile after it"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run's attention came to. default_name: of ComfyUI's function; remarks: sentences."""

    config: AttentionConfig
    entries: Mapping[Any, Entry]
    default_name: str
    num_steps: int
    num_model_calls: int
    num_attention_calls: int
    is_compiled: bool
    remarks: Sequence[str]


def section_of(state: Outcome) -> Section:
    """The report of one run's attention."""
    entries = state.entries
    calls: Counter[str] = Counter()
    for entry in entries.values():
        for kernel_id, count in entry.answers.items():
            calls[_shown(kernel_id, state.default_name)] += count
    reasons = reasons_of(entries)
    if state.num_model_calls and not state.num_attention_calls:
        reasons[COMPILED if state.is_compiled else NOT_REACHED] = state.num_model_calls
    reasons.update(dict.fromkeys(state.remarks, 1))
    speedup = speedup_vs_exact(list(entries.values()))
    layers = layers_of(entries, state.default_name)
    approximate = any(
        entry.kernel is not None and entry.kernel.category != "exact" for entry in entries.values()
    )
    json = {
        "policy": state.config.policy,
        "backend": state.config.backend,
        "label": "approximate" if approximate else "exact",
        "calls": dict(calls.most_common()),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "layers": layers,
        "speedup_vs_exact": speedup,
        "config": state.config.to_json(),
    }
    return Section(json, _lines(state.config.policy, json), (_grid(state),) if entries else ())


def speedup_vs_exact(entries: list[Entry]) -> float | None:
    """Attention time with exact kernels over the time with those chosen; None if not timed."""
    timed = [e for e in entries if e.chosen_ms and e.exact_ms]
    chosen = sum(e.calls * (e.chosen_ms or 0.0) for e in timed)
    exact = sum(e.calls * (e.exact_ms or 0.0) for e in timed)
    return round(exact / chosen, 3) if chosen else None


def layers_of(entries: Mapping[Any, Entry], default_name: str) -> list[dict[str, Any]]:
    """One object per block and call: what answered it most, its error, its size."""
    by_block: dict[BlockKey, list[Entry]] = {}
    for entry in entries.values():
        by_block.setdefault(entry.block, []).append(entry)
    layers = []
    for block, group in by_block.items():
        answers: Counter[str] = Counter()
        for entry in group:
            answers.update(entry.answers)
        verdicts = [e.verdict for e in group if e.verdict is not None]
        worst = max(verdicts, key=lambda v: v.rel_l1, default=None)
        layers.append(
            {
                "block": str(block),
                "kernels": {_shown(k, default_name): n for k, n in answers.most_common()},
                "tokens": max(e.request.q_tokens for e in group),
                "rel_l1": None if worst is None else round(worst.rel_l1, 6),
                "cosine": None if worst is None else round(worst.cosine, 6),
            }
        )
    return layers


def _shown(kernel_id: str, default_name: str) -> str:
    """ComfyUI's own function by its name: 'comfyui:pytorch'."""
    if kernel_id != DEFAULT:
        return kernel_id
    return f"comfyui:{default_name.removeprefix('attention_') or 'default'}"


def _lines(policy: str, json: dict[str, Any]) -> tuple[str, ...]:
    total = sum(json["calls"].values())
    shares = ", ".join(f"{name} {count}" for name, count in json["calls"].items())
    line = f"Attention ({policy}): {total} calls: {shares}" if total else f"Attention ({policy})"
    if json["speedup_vs_exact"]:
        line += f"; {json['speedup_vs_exact']:.2f}x the exact kernels' speed by timing"
    reasons = [f"  {sentence} ({n} calls)" for sentence, n in list(json["reasons"].items())[:6]]
    return (line, *reasons)


def _grid(state: Outcome) -> Grid:
    """Rows: blocks and their calls in the order they ran; columns: steps."""
    num_steps = state.num_steps
    rows: dict[str, list[str | None]] = {}
    legend: dict[str, str] = {}
    for entry in state.entries.values():
        row = rows.setdefault(str(entry.block), [None] * num_steps)
        for step, kernel_id in entry.steps:
            shown = _shown(kernel_id, state.default_name)
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
