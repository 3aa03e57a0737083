"""Sequence parallel in the report: what was shared, what was not and why, where the time went."""

from dataclasses import dataclass, field
from typing import Any

from ..backends.report import Section
from .distribute import Lane
from .mesh import Layout


@dataclass
class Counts:
    """What happened in one run. seconds: by kind, of the shared calls on rank 0."""

    workers: int = 1
    shared: int = 0
    local: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    layouts: dict[Layout, int] = field(default_factory=dict)
    lanes: dict[Layout, dict[int, Lane]] = field(default_factory=dict)  # by layout and number
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    devices: tuple[str, ...] = ()
    link_bytes_per_s: float | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)  # of each worker, see messages.Ping

    def count_local(self, reason: str) -> None:
        self.local += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


def section(counts: Counts) -> Section:
    """The technique's part of the report; the layout is the one most calls had."""
    layout = max(counts.layouts, key=lambda one: counts.layouts[one], default=Layout())
    exchange = counts.seconds.get("exchange", 0.0) + counts.seconds.get("gather", 0.0)
    broadcast = counts.seconds.get("broadcast", 0.0)
    total = counts.seconds.get("call", 0.0)
    compute = max(total - exchange - broadcast, 0.0)
    found: dict[str, Any] = {
        "workers": counts.workers,
        "layout": str(layout),
        "batch": layout.batch,
        "ulysses": layout.ulysses,
        "ring": layout.ring,
        "cfg": layout.cfg,
        "calls_distributed": counts.shared,
        "calls_local": counts.local,
        "reasons": counts.reasons,
        "seconds": {
            "compute": round(compute, 4),
            "exchange": round(exchange, 4),
            "broadcast": round(broadcast, 4),
        },
        "bytes_exchanged": counts.bytes_sent,
        "devices": list(counts.devices),
        "rows": [
            {
                "devices": list(lane.devices),
                "rows": lane.num_rows,
                "ms_per_row": None if lane.row_s is None else round(lane.row_s * 1000, 1),
            }
            for lane in _lanes(counts, layout)
        ],
        "link_bytes_per_s": counts.link_bytes_per_s,
        "worker_device_bytes": [one["device_bytes"] for one in counts.memory],
        "worker_private_bytes": [one["private_bytes"] for one in counts.memory],
    }
    share = (exchange + broadcast) / max(total, 1e-9)
    return Section(found, tuple(_lines(counts, layout, share)))


def _lanes(counts: Counts, layout: Layout) -> list[Lane]:
    found = counts.lanes.get(layout, {})
    return [found[number] for number in sorted(found)]


def _said(lane: Lane) -> str:
    name = "+".join(lane.devices)
    pace = "" if lane.row_s is None else f", {lane.row_s * 1000:.0f} ms each"
    if not lane.num_rows:
        return f"{name} left out (too slow for one{pace})"
    return f"{name} {lane.num_rows}{pace}"


def _lines(counts: Counts, layout: Layout, share: float) -> list[str]:
    if counts.workers == 1 and not counts.local:
        return []
    total = counts.shared + counts.local
    if counts.workers == 1:
        return [f"parallel: one device for {counts.local} calls"]
    head = f"parallel: {counts.shared}/{total} calls over {counts.workers} processes ({layout})"
    if counts.shared:
        head += f", exchange and broadcast {share:.0%} of their time"
    lines = [head]
    lanes = _lanes(counts, layout)
    if lanes:
        lines.append("rows of a batch: " + ", ".join(map(_said, lanes)))
    peaks = [one["device_bytes"] for one in counts.memory if one["device_bytes"]]
    if peaks:
        shown = ", ".join(f"{peak / (1 << 30):.1f}" for peak in peaks)
        lines.append(f"peak of the workers' devices: {shown} GiB")
    lines += [f"on one device, {n} times: {reason}" for reason, n in counts.reasons.items()]
    return lines
