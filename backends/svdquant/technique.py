"""The report's side of a loaded SVDQuant model: one state per sampling run.

While a run lasts, the model's layers have a Session for what they need more than once; its end
empties it. The section says which kernel computed how many layers and what was passed over.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..report import Section
from .engine import Engine
from .kernels.kitchen import release_workspaces
from .linear import Session
from .lora import refused_types

KEY = "svdquant"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Facts of a loaded file. keys: the patch keys of its quantised weights, layer by layer;
    notes: sentences for every report; copy: where its unpacked copy is, or why there is none."""

    title: str
    family: str
    dialect: str
    weight_bytes: int
    keys: tuple[str, ...]
    notes: tuple[str, ...] = ()
    copy: str = ""


@dataclass(frozen=True)
class SVDQuantTechnique:
    """Attached to the MODEL by the loader; clones share it."""

    loaded: Loaded
    engine: Engine = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return KEY

    def start(self, run: Any) -> "SVDQuantState":
        if self.engine.measure_later is not None:
            self.engine.measure_later()
        return SVDQuantState(run, self.loaded, self.engine)


class SVDQuantState:
    """One run: opens the layers' session, counts LoRA layers, names patches it must refuse."""

    def __init__(self, run: Any, loaded: Loaded, engine: Engine):
        self.loaded, self.engine = loaded, engine
        self.session, self.outer = Session(), engine.session
        patches = patches_by_key(run.patcher, loaded.keys)
        self.refused: dict[str, list[str]] = {}
        for key, found in patches.items():
            for kind in refused_types(found):
                self.refused.setdefault(kind, []).append(key)
        self.num_lora = sum(
            len(refused_types(found)) < len(found) for found in patches.values() if found
        )
        for note in (*loaded.notes, *(refusal(*kept) for kept in self.refused.items())):
            run.note(note)
        engine.session = self.session

    def section(self) -> Section:
        counts = Counter(kernel for ids in self.session.ran.values() for kernel in ids)
        backend = counts.most_common(1)[0][0] if counts else self.engine.backend
        reasons = dict(self.engine.reasons)
        reasons |= {f"lora: {k}": refusal(k, keys) for k, keys in self.refused.items()}
        return Section(
            json={
                "family": self.loaded.family,
                "dialect": self.loaded.dialect,
                "backend": backend,
                "layers": len(self.loaded.keys),
                "weight_bytes": self.loaded.weight_bytes,
                "lora_layers": self.num_lora,
                "copy": self.loaded.copy,
                "reasons": reasons,
            },
            lines=self.lines(counts),
        )

    def lines(self, counts: Counter[str]) -> tuple[str, ...]:
        ran = ", ".join(f"{count} {kernel}" for kernel, count in counts.most_common())
        head = (
            f"SVDQuant: {self.loaded.title}, {len(self.loaded.keys)} 4-bit layers "
            f"({ran or 'none ran'}), {size_text(self.loaded.weight_bytes)}"
        )
        if self.num_lora:
            head += f", LoRA on {self.num_lora}"
        copy = (f"SVDQuant: {self.loaded.copy}",) if self.loaded.copy else ()
        reasons = (f"SVDQuant {kernel}: {why}" for kernel, why in self.engine.reasons.items())
        return (*self.engine.notices, head, *copy, *reasons)

    def close(self) -> None:
        self.session.clear()
        release_workspaces()
        if self.engine.session is self.session:
            self.engine.session = self.outer


def size_text(num_bytes: int) -> str:
    """Bytes as GB or MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def refusal(kind: str, keys: list[str]) -> str:
    """The sentence for a patch type that quantised layers cannot take."""
    names = [key.removeprefix("diffusion_model.").removesuffix(".weight") for key in keys]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"LoRA type '{kind}' is not supported on quantised layers and was left out: keys {shown}"


def patches_by_key(patcher: Any, keys: tuple[str, ...]) -> dict[str, list[Any]]:
    """Patches of each quantised weight: of loader nodes, and of LoRA hooks."""
    found: dict[str, list[Any]] = {}
    for source in (patcher.patches, *getattr(patcher, "hook_patches", {}).values()):
        for key in keys:
            if key in source:
                found.setdefault(key, []).extend(source[key])
    return found
