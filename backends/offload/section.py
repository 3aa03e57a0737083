"""The report's offload section: what was in force, what it cost, what would be better."""

from dataclasses import dataclass, field
from typing import Any

from ..memory.section import gib
from ..report import Section
from .config import OffloadConfig
from .plan import MIN_GAIN, OffloadPlan
from .trial import Setting, Verdict


@dataclass
class Outcome:
    """What one run did. None: not known, or there was nothing to know.

    manager: "classic" or "dynamic"; budget_bytes: cap for weights and buffers; depth: blocks
    staged ahead, -1 for ComfyUI's own streaming; num_skipped: blocks that did not run (a
    cache, skip-layer guidance); is_plan_in_force: the residency is the plan's; prefetch_gain: the
    most that was expected of prefetch; tried, verdict, gain: what mode auto tried, and how that
    did, see Tuner; copy_rates: pinned and pageable bytes per second; four_bit_bytes: of a 4-bit
    file that would fit.
    """

    reason: str | None = None
    no_prefetch: str | None = None
    manager: str | None = None
    budget_bytes: int | None = None
    resident_bytes: int | None = None
    streamed_bytes: int | None = None
    pinned_bytes: int | None = None
    buffer_bytes: int = 0
    depth: int = -1
    num_copies: int = 0
    num_skipped: int = 0
    stall_seconds: float | None = None
    plan: OffloadPlan | None = None
    is_plan_in_force: bool = False
    prefetch_gain: float | None = None
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    copy_rates: tuple[float, float] | None = None
    is_rolled_back: bool = False
    tried: Setting | None = None
    verdict: Verdict | None = None
    gain: float | None = None
    num_steps: int = 0
    four_bit_bytes: int | None = None
    remarks: list[str] = field(default_factory=list)


def write(config: OffloadConfig, outcome: Outcome) -> Section:
    """The JSON object and the lines of text."""
    if outcome.reason is not None:
        fields = {**_json(config, outcome), "reason": outcome.reason}
        return Section(json=fields, lines=(f"offload: nothing done, {outcome.reason}",))
    return Section(json=_json(config, outcome), lines=tuple(_lines(config, outcome)))


def _json(config: OffloadConfig, outcome: Outcome) -> dict[str, Any]:
    rates = outcome.copy_rates
    return {
        "mode": config.mode,
        "manager": outcome.manager,
        "budget_bytes": outcome.budget_bytes,
        "resident_bytes": outcome.resident_bytes,
        "streamed_bytes": outcome.streamed_bytes,
        "pinned_bytes": outcome.pinned_bytes,
        "buffer_bytes": outcome.buffer_bytes,
        "prefetch_blocks": max(outcome.depth, 0),
        "no_prefetch": outcome.no_prefetch,
        "block_copies": outcome.num_copies,
        "blocks_skipped": outcome.num_skipped,
        "stall_seconds": outcome.stall_seconds,
        "plan": None if outcome.plan is None else _plan_json(outcome.plan),
        "predicted_step_seconds": outcome.predicted_step_seconds,
        "measured_step_seconds": outcome.measured_step_seconds,
        "prefetch_gain_at_most": outcome.prefetch_gain,
        "pinned_bytes_per_second": None if rates is None else rates[0],
        "pageable_bytes_per_second": None if rates is None else rates[1],
        "rolled_back": outcome.is_rolled_back,
        "trial": outcome.verdict,
        "measured_gain": outcome.gain,
        "four_bit_bytes": outcome.four_bit_bytes,
    }


def _plan_json(plan: OffloadPlan) -> dict[str, Any]:
    return {
        "resident_bytes": plan.resident_bytes,
        "resident_blocks": list(plan.resident_blocks),
        "prefetch_blocks": max(plan.depth, 0),
        "call_seconds": plan.forecast.seconds,
        "stall_seconds": plan.forecast.stall_seconds,
        "why": plan.why,
    }


def _lines(config: OffloadConfig, outcome: Outcome) -> list[str]:
    lines = [_headline(config, outcome)]
    if outcome.measured_step_seconds is not None:
        parts = [f"step {outcome.measured_step_seconds:.3f} s"]
        if outcome.predicted_step_seconds is not None:
            parts.append(f"predicted {outcome.predicted_step_seconds:.3f} s")
        if outcome.stall_seconds is not None:
            parts.append(f"{outcome.stall_seconds:.3f} s of it waiting for copies")
        lines.append("  " + ", ".join(parts))
    if outcome.copy_rates is not None:
        lines.append("  " + _copies(*outcome.copy_rates))
    if outcome.plan is not None:
        lines.extend("  " + line for line in _plan(config, outcome, outcome.plan))
    if config.mode == "auto":
        lines.extend("  " + line for line in _tried(outcome))
    elif outcome.is_rolled_back:
        lines.append("  the plan was tried and undone: it made a step over 3 % longer")
    if outcome.no_prefetch and config.mode not in ("auto", "off"):
        lines.append(f"  no block prefetch: {outcome.no_prefetch}")
    return lines + [f"  {remark}" for remark in outcome.remarks]


def _tried(outcome: Outcome) -> list[str]:
    """What mode auto tried, and how that did."""
    what = "holding fewer weights, the device is too full"
    if outcome.tried is None or outcome.tried.prefetches:
        what = "block prefetch"
    gained = ""
    if outcome.gain is not None:
        gained = f"{abs(outcome.gain):.1%} {'longer' if outcome.gain < 0 else 'shorter'}"
    match outcome.verdict:
        case "kept":
            return [f"{what}: tried and kept, a model call is {gained}"]
        case "undone":
            return [f"{what}: tried and undone, a model call was {gained}"]
        case "not comparable":
            return [f"{what}: tried and undone, no two steps did the same work to compare"]
        case "kept before":
            return [f"{what}: from the first step on, an earlier run measured calls {gained}"]
        case "undone before":
            return [f"{what}: not tried, an earlier run measured calls {gained}"]
        case "too few steps":
            expected = outcome.prefetch_gain or 0
            if expected >= MIN_GAIN:
                return [
                    f"{what}: could save up to {expected:.0%} of a step (estimated), not tried in "
                    f"{outcome.num_steps} steps"
                ]
    return []


def _headline(config: OffloadConfig, outcome: Outcome) -> str:
    known = outcome.resident_bytes, outcome.streamed_bytes
    if None in known:
        return f"offload: {config.mode}, {outcome.manager}, the model was not loaded"
    budget = "no cap" if outcome.budget_bytes is None else f"budget {gib(outcome.budget_bytes)} GiB"
    resident, streamed = (gib(size or 0) for size in known)
    blocks = "block" if outcome.depth == 1 else "blocks"
    ahead = f", {outcome.depth} {blocks} ahead" if outcome.depth > 0 else ""
    return (
        f"offload: {config.mode}, {outcome.manager}, {budget}: {resident} GiB resident, "
        f"{streamed} streamed{ahead}, buffers {gib(outcome.buffer_bytes)}"
    )


def _copies(pinned: float, pageable: float) -> str:
    if pinned == pageable:
        return f"copies from RAM: {pageable / 1e9:.1f} GB/s measured, nothing can be pinned"
    return f"copies: {pinned / 1e9:.1f} GB/s from pinned RAM, {pageable / 1e9:.1f} else, measured"


def _plan(config: OffloadConfig, outcome: Outcome, plan: OffloadPlan) -> list[str]:
    """What the plan says, and whether it is in force."""
    if plan.resident_bytes is None:
        return [plan.why]
    resident = f"{gib(plan.resident_bytes)} GiB resident"
    ahead = f"{plan.depth} block{'s' if plan.depth > 1 else ''} ahead"
    if outcome.no_prefetch is not None:
        if not outcome.is_plan_in_force:
            return []
        return [f"plan: {resident}, estimated as if blocks were copied ahead: {plan.why}"]
    if outcome.is_plan_in_force:
        return [f"plan: {resident}, {ahead}: {plan.why}"]
    if config.mode == "auto":
        return []
    name = "best with prefetch" if config.mode == "speed" else "plan for prefetch, not used"
    return [f"{name}: {resident}, {ahead}: {plan.why}"]
