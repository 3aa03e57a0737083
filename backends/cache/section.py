"""The cache's part of a report: JSON, a line, evaluations x branches, the metric's curve."""

import math
from collections.abc import Sequence
from typing import Any

from ..report import Curve, Grid, Section
from .decisions import OVERRULED, Event

COMPUTED, REUSED = "computed", "reused"
LEGEND = {COMPUTED: "computed", REUSED: "reused"}
LAYER_LEGEND = {COMPUTED: "computed", REUSED: "repeated"}


def section(
    *,
    strategy: str,
    engine: str,
    unit: str,
    events: Sequence[Event],
    layers: dict[tuple[str, int], bool],
    threshold: float | None,
    peak_bytes: int,
    num_evaluations: int,
    settings: dict[str, Any],
) -> Section:
    """JSON keys as the report's contract has them; decisions: one entry per model call."""
    hits = num_hits(events)
    computed = sum(event.blocks_computed for event in events)
    skipped = sum(event.blocks_skipped for event in events)
    json = {
        "strategy": strategy,
        "engine": engine,
        "evaluations": num_evaluations,
        "hits": hits,
        "unit": unit,
        "blocks_computed": computed,
        "blocks_skipped": skipped,
        "peak_bytes": peak_bytes,
        "threshold": threshold,
        "settings": settings,
        "decisions": [_entry(event) for event in events],
    }
    speed = f", est. {(computed + skipped) / computed:.1f}x fewer {unit}" if computed else ""
    calibrator = settings["calibrator"]
    name = strategy if calibrator in ("none", strategy) else f"{strategy} with {calibrator}"
    line = (
        f"{name}: {hits}/{num_evaluations} evaluations reused{speed}, "
        f"peak {peak_bytes / 2**20:.1f} MB, engine {engine}"
    )
    figures: list[Grid | Curve] = []
    if events:
        figures.append(_layer_grid(layers) if layers else _branch_grid(events))
        curve = _curve(events, threshold)
        figures += [curve] if curve is not None else []
    return Section(json=json, lines=(line,), figures=tuple(figures))


def num_hits(events: Sequence[Event]) -> int:
    """Evaluations whose model calls were all reused."""
    by_evaluation: dict[int, list[bool]] = {}
    for event in events:
        by_evaluation.setdefault(event.evaluation, []).append(event.decision.reuse)
    return sum(all(reused) for reused in by_evaluation.values())


def zero_reuse_sentence(
    strategy: str, events: Sequence[Event], threshold: float | None, num_open: int
) -> str | None:
    """Why nothing was reused and what would change that; None if something was."""
    if not events or any(event.decision.reuse for event in events):
        return None
    if num_open == 0:
        return (
            f"{strategy} reused nothing: warmup and cooldown cover all steps. "
            "Lower warmup, or use more steps."
        )
    num_overruled = sum(event.decision.reason == OVERRULED for event in events)
    if num_overruled:
        return (
            f"{strategy} reused nothing: sequence parallel computed {num_overruled} of "
            f"{len(events)} calls that it would have reused, because the workers did not have "
            "the earlier results."
        )
    known = (e.decision.diff for e in events if e.decision.diff is not None)
    diffs = sorted(diff for diff in known if math.isfinite(diff))
    if not diffs or threshold is None:
        reasons = sorted({event.decision.reason for event in events})
        return f"{strategy} reused nothing: every call was computed ({', '.join(reasons)})."
    num_evaluations = len({event.evaluation for event in events})
    wanted = diffs[min(math.ceil(num_evaluations / 3), len(diffs)) - 1]
    better = math.ceil(wanted * 1000 + 1) / 1000
    advice = f"a threshold of {better:g} would have reused about a third of the steps"
    if better > 0.99:
        advice = "its steps differ too much for this strategy, use more steps or scm"
    return (
        f"{strategy} reused nothing: the change between steps was {diffs[0]:.3g} to "
        f"{diffs[-1]:.3g}, the threshold is {threshold:.3g}; {advice}."
    )


def _entry(event: Event) -> dict[str, Any]:
    diff = event.decision.diff
    return {
        "step": event.step,
        "evaluation": event.evaluation,
        "branch": event.branch,
        "reused": event.decision.reuse,
        "diff": diff if diff is None or math.isfinite(diff) else None,
        "reason": event.decision.reason,
    }


def _branch_grid(events: Sequence[Event]) -> Grid:
    """Rows: branches; columns: evaluations."""
    branches = list(dict.fromkeys(event.branch for event in events))
    evaluations = sorted({event.evaluation for event in events})
    steps = {event.evaluation: event.step for event in events}
    cells = {(e.branch, e.evaluation): REUSED if e.decision.reuse else COMPUTED for e in events}
    return Grid(
        title="Cache: evaluations x branches",
        row_labels=tuple(branches),
        column_labels=tuple(str(steps[e]) for e in evaluations),
        cells=tuple(tuple(cells.get((b, e)) for e in evaluations) for b in branches),
        legend=LEGEND,
        row="branch",
    )


def _layer_grid(layers: dict[tuple[str, int], bool]) -> Grid:
    """Rows: layers in execution order; columns: evaluations."""
    rows = list(dict.fromkeys(layer for layer, _ in layers))
    evaluations = sorted({evaluation for _, evaluation in layers})
    words = {None: None, True: REUSED, False: COMPUTED}
    return Grid(
        title="Cache: evaluations x layers",
        row_labels=tuple(rows),
        column_labels=tuple(map(str, evaluations)),
        cells=tuple(tuple(words[layers.get((r, e))] for e in evaluations) for r in rows),
        legend=LAYER_LEGEND,
        column="evaluation",
    )


def _curve(events: Sequence[Event], threshold: float | None) -> Curve | None:
    """The compared change per evaluation; None if nothing was compared."""
    compared: dict[int, Event] = {}
    for event in events:
        known = compared.get(event.evaluation)
        if known is None or known.decision.diff is None:
            compared[event.evaluation] = event
    if threshold is None or all(e.decision.diff is None for e in compared.values()):
        return None
    order = sorted(compared)
    return Curve(
        title="Cache: change per evaluation",
        xs=tuple(float(e) for e in order),
        ys=tuple(compared[e].decision.diff for e in order),
        threshold=threshold,
        marks=tuple(compared[e].decision.reuse for e in order),
    )
