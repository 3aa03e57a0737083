"""The memory section, pure: what models held and what the device counted, in; sentences out.

Also says which components could stay resident in the headroom seen, each with the node setting or
ComfyUI flag that does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..report import Section

GIB = 1 << 30
_WORTH_BYTES = 1 << 20  # a model with less than this offloaded counts as resident
NODE = "Slipstream Layer Offload"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """One model that ComfyUI holds.

    key: identity; kind: "diffusion model", "text encoder", "VAE" or "model"; total_bytes,
    loaded_bytes, pinned_bytes: of its weights, on its load device, in page-locked RAM;
    on_cpu: its load device is the CPU; is_sampled: the model of this run; is_capped: by our budget.
    """

    key: int
    name: str
    kind: str
    device: str
    total_bytes: int
    loaded_bytes: int
    pinned_bytes: int
    is_dynamic: bool = False
    on_cpu: bool = False
    is_sampled: bool = False
    is_capped: bool = False

    @property
    def offloaded_bytes(self) -> int:
        return self.total_bytes if self.on_cpu else max(self.total_bytes - self.loaded_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What one run saw. stages: name -> peak bytes of the device, None where it cannot say."""

    device: str
    total_bytes: int | None
    reserve_bytes: int
    stages: dict[str, int | None]
    models: tuple[LoadedModel, ...]
    flags: frozenset[str] = frozenset()

    @property
    def peak_bytes(self) -> int | None:
        return max((peak for peak in self.stages.values() if peak is not None), default=None)

    @property
    def headroom_bytes(self) -> int:
        """What the device had left at its fullest, without what ComfyUI reserves for others."""
        if self.total_bytes is None or self.peak_bytes is None:
            return 0
        return max(self.total_bytes - self.peak_bytes - self.reserve_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A component that could stay resident: what it needs, and what makes it so."""

    model: LoadedModel
    needed_bytes: int
    how: str


def merged(before: Sequence[LoadedModel], after: Sequence[LoadedModel]) -> tuple[LoadedModel, ...]:
    """`after`, and those of `before` that are gone since, with nothing loaded."""
    kept = {model.key for model in after}
    gone = (replace(m, loaded_bytes=0, pinned_bytes=0) for m in before if m.key not in kept)
    return (*after, *gone)


def could_stay(use: MemoryUse) -> list[Resident]:
    """The components that fit the headroom together: the sampled model first, then small ones."""
    waiting = [m for m in use.models if m.offloaded_bytes >= _WORTH_BYTES]
    waiting.sort(key=lambda m: (not m.is_sampled, m.offloaded_bytes))
    left, found = use.headroom_bytes, []
    for model in waiting:
        if model.offloaded_bytes <= left:
            left -= model.offloaded_bytes
            how = _how(model, use)
            found.append(Resident(model=model, needed_bytes=model.offloaded_bytes, how=how))
    return found


def _how(model: LoadedModel, use: MemoryUse) -> str:
    if model.is_capped:
        needed = -(-model.total_bytes * 10 // GIB) / 10
        return f"set {NODE} to mode auto with vram_budget_gb {needed:.1f} or more, or to off"
    if model.on_cpu:
        if model.kind == "VAE" and "--cpu-vae" in use.flags:
            return "start ComfyUI without --cpu-vae"
        return "it runs on the CPU: choose the default device on its loader"
    for flag in ("--novram", "--lowvram", "--disable-smart-memory"):
        if flag in use.flags and not model.is_dynamic:
            return f"start ComfyUI without {flag}"
    if model.is_dynamic:
        return "nothing to set: ComfyUI loads it again when it is used next"
    if "--reserve-vram" in use.flags:
        return "give --reserve-vram less, or start ComfyUI with --highvram"
    return "start ComfyUI with --highvram, which keeps whole models on the device"


def section(use: MemoryUse) -> Section:
    """The report's memory section."""
    residents = could_stay(use)
    fields: dict[str, Any] = {
        "device": use.device,
        "total_bytes": use.total_bytes,
        "peak_bytes": use.peak_bytes,
        "headroom_bytes": use.headroom_bytes,
        "stages": use.stages,
        "models": [_model_json(model) for model in use.models],
        "could_stay_resident": [
            {"name": r.model.name, "kind": r.model.kind, "bytes": r.needed_bytes, "how": r.how}
            for r in residents
        ],
    }
    return Section(json=fields, lines=(_headline(use), *_model_lines(use), *_advice(residents)))


def _model_json(model: LoadedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "device": model.device,
        "manager": "dynamic" if model.is_dynamic else "classic",
        "total_bytes": model.total_bytes,
        "resident_bytes": 0 if model.on_cpu else model.loaded_bytes,
        "streamed_bytes": model.offloaded_bytes,
        "pinned_bytes": model.pinned_bytes,
    }


def _headline(use: MemoryUse) -> str:
    if use.device == "cpu":
        return "memory: the model runs on the CPU, so there is no VRAM to count"
    if use.peak_bytes is None or use.total_bytes is None:
        return f"memory: {use.device} has no counters of device memory"
    stages = ", ".join(
        f"{name} {gib(peak)}" for name, peak in use.stages.items() if peak is not None
    )
    return f"memory: peak {gib(use.peak_bytes)} of {gib(use.total_bytes)} GiB ({stages})"


def _model_lines(use: MemoryUse) -> list[str]:
    lines = []
    for m in use.models:
        line = f"  {m.name} ({m.kind}, {m.device}): {gib(m.total_bytes)} GiB"
        if not m.on_cpu:
            line += (
                f", {gib(m.loaded_bytes)} resident, {gib(m.offloaded_bytes)} offloaded, "
                f"{gib(m.pinned_bytes)} pinned"
            )
        lines.append(line)
    return lines


def _advice(residents: Sequence[Resident]) -> list[str]:
    return [f"  {r.model.name} could stay resident: {r.how}" for r in residents]


def gib(size: int) -> str:
    """Bytes as GiB with a precision that fits the size."""
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
