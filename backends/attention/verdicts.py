"""Accuracy checks that were made before: per model, machine, layer, shape and kernel.

A run trusts them and checks one layer itself, the worst known: if that layer no longer holds, the
model's verdicts on this kernel are forgotten and every layer is checked again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..store import Store
from .probe import Verdict
from .request import BlockKey, Request
from .timings import machine_key, shape_key

FILE_NAME = "slipstream_attention_verdicts.json"
FORMAT = 1
MOST_MODELS = 64  # the longest unused one goes

Layers = dict[str, list[float]]  # layer -> [rel_l1, cosine]; not finite: [-1, -1]


class Verdicts:
    """Verdicts of one model. model: its fingerprint; forget: begin without the earlier ones."""

    def __init__(
        self, folder: Path | None, model: str, versions: Mapping[str, str], *, forget: bool = False
    ):
        self._store = Store(folder, FILE_NAME, FORMAT)
        self._model, self._versions, self._forget = model, dict(versions), forget
        self._loaded: dict[str, Layers] | None = None  # "machine | shape | kernel" -> layers
        self._distrusted: set[str] = set()
        self._changed = False

    def known(self, block: BlockKey, request: Request, kernel_id: str) -> Verdict | None:
        """The verdict of an earlier run, None if there is none or it is no longer trusted."""
        key = self._key(request, kernel_id)
        if key in self._distrusted:
            return None
        values = self._mine.get(key, {}).get(str(block))
        return None if values is None else _verdict(values)

    def is_sample(
        self,
        block: BlockKey,
        request: Request,
        kernel_id: str,
        passes: Callable[[Verdict], bool],
    ) -> bool:
        """Whether this layer stands for the others: the worst of those that still pass."""
        layers = self._mine.get(self._key(request, kernel_id), {})
        usable = {layer: v[0] for layer, v in layers.items() if passes(_verdict(v))}
        return bool(usable) and max(usable, key=lambda layer: usable[layer]) == str(block)

    def put(self, block: BlockKey, request: Request, kernel_id: str, verdict: Verdict) -> None:
        """Remember a check of this run; the worse of two of one layer stays."""
        key, layer = self._key(request, kernel_id), str(block)
        values = (
            [round(verdict.rel_l1, 6), round(verdict.cosine, 6)] if verdict.finite else [-1, -1]
        )
        layers = self._mine.setdefault(key, {})
        before = layers.get(layer)
        if before is None or values[0] < 0 or (before[0] >= 0 and values[0] > before[0]):
            layers[layer] = [round(value, 6) for value in values]
            self._changed = True

    def distrust(self, request: Request, kernel_id: str) -> None:
        """The sample did not hold: what was known about this kernel and shape is void."""
        key = self._key(request, kernel_id)
        self._distrusted.add(key)
        self._mine.pop(key, None)
        self._changed = True

    def save(self) -> str | None:
        """Write what was added; returns a sentence if the file cannot be written."""
        if not self._changed:
            return None
        models = self._read_all()
        models.pop(self._model, None)
        models[self._model] = self._mine  # the newest stands last
        while len(models) > MOST_MODELS:
            models.pop(next(iter(models)))
        why = self._store.write({"models": models})
        if why is not None:
            return f"Attention verdicts: {why}"
        self._changed = False
        return None

    @property
    def _mine(self) -> dict[str, Layers]:
        if self._loaded is None:
            self._loaded = {} if self._forget else self._read_all().get(self._model, {})
        return self._loaded

    def _key(self, request: Request, kernel_id: str) -> str:
        machine = machine_key(request.device_name, self._versions)
        return f"{machine} | {shape_key(request)} | {kernel_id}"

    def _read_all(self) -> dict[str, dict[str, Layers]]:
        models: Any = self._store.read().get("models")
        return models if _well_formed(models) else {}


def _verdict(values: list[float]) -> Verdict:
    rel_l1, cosine = values
    if rel_l1 < 0:
        return Verdict(float("inf"), 0.0, False)
    return Verdict(rel_l1, cosine, True)


def _well_formed(models: Any) -> bool:
    """model -> key -> layer -> [rel_l1, cosine], and nothing else."""
    if not isinstance(models, dict):
        return False
    for keys in models.values():
        if not isinstance(keys, dict) or not all(isinstance(x, dict) for x in keys.values()):
            return False
        for layers in keys.values():
            for values in layers.values():
                if not isinstance(values, list) or len(values) != 2:
                    return False
                if not all(isinstance(v, (int, float)) for v in values):
                    return False
    return True
