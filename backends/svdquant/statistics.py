"""What calibration records about a layer's inputs, and the file it is kept in.

Per layer of ComfyUI's network: the largest absolute input per channel and some rows of inputs.
Files are safetensors; runs recorded under one name are merged.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import CheckpointError
from .header import read_header

FORMAT = "slipstream.svdquant.statistics"
NUM_KEPT_ROWS = 64
_ROWS_PER_CALL = 4


@dataclass
class LayerInputs:
    """absmax [K] fp32 over all inputs seen; rows [<= 64, K] 16-bit, a sample of them."""

    absmax: torch.Tensor
    rows: torch.Tensor
    num_calls: int = 0


@dataclass
class Statistics:
    """The inputs of a model's layers by layer name; model: the network's class name."""

    model: str
    layers: dict[str, LayerInputs] = field(default_factory=dict)
    num_runs: int = 0
    _generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(0), repr=False
    )

    def record(self, name: str, inputs: torch.Tensor) -> None:
        """Note the inputs [..., K] of one call of layer `name`."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if not flat.shape[0]:
            return
        absmax = flat.abs().amax(0).float().cpu()
        picks = torch.linspace(0, flat.shape[0] - 1, min(_ROWS_PER_CALL, flat.shape[0]))
        rows = flat[picks.long().to(flat.device)].to(torch.bfloat16).cpu()
        known = self.layers.get(name)
        if known is None:
            self.layers[name] = LayerInputs(absmax, rows, 1)
            return
        known.absmax = torch.maximum(known.absmax, absmax)
        known.num_calls += 1
        known.rows = self._sampled(known, rows)

    def _sampled(self, known: LayerInputs, rows: torch.Tensor) -> torch.Tensor:
        """Reservoir sampling, so that late steps are kept as often as early ones."""
        if len(known.rows) < NUM_KEPT_ROWS:
            return torch.cat([known.rows, rows])[:NUM_KEPT_ROWS]
        kept = known.rows
        for row in rows:
            at = int(
                torch.randint(known.num_calls * _ROWS_PER_CALL, (1,), generator=self._generator)
            )
            if at < NUM_KEPT_ROWS:
                kept[at] = row
        return kept

    def merge(self, other: "Statistics") -> None:
        """Add the runs of `other` (of the same model)."""
        for name, inputs in other.layers.items():
            known = self.layers.get(name)
            if known is None:
                self.layers[name] = inputs
                continue
            known.absmax = torch.maximum(known.absmax, inputs.absmax)
            half = NUM_KEPT_ROWS // 2
            known.rows = torch.cat([known.rows[:half], inputs.rows[: NUM_KEPT_ROWS - half]])
            known.num_calls += inputs.num_calls
        self.num_runs += other.num_runs

    def save(self, path: Path) -> None:
        """Write the file; it is complete or absent, whatever happens."""
        from safetensors.torch import save_file

        tensors = {}
        for name, inputs in self.layers.items():
            tensors[f"{name}.absmax"] = inputs.absmax.contiguous()
            tensors[f"{name}.rows"] = inputs.rows.contiguous()
        metadata = {"format": FORMAT, "model": self.model, "num_runs": str(self.num_runs)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata=metadata)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def load_statistics(path: Path) -> Statistics:
    """Statistics from a file. Raises CheckpointError if it is anything else."""
    from safetensors import safe_open

    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} holds no calibration statistics: make them with SVDQuant Calibrate"
        )
    found = Statistics(header.metadata.get("model", ""))
    found.num_runs = int(header.metadata.get("num_runs", "0") or 0)
    with safe_open(str(path), framework="pt") as file:
        for name in _layer_names(header.tensors):
            absmax, rows = file.get_tensor(f"{name}.absmax"), file.get_tensor(f"{name}.rows")
            if rows.dim() != 2 or absmax.shape != rows.shape[1:] or not len(rows):
                raise CheckpointError(f"{path.name}: the statistics of {name} are damaged")
            found.layers[name] = LayerInputs(absmax.float(), rows, len(rows) // _ROWS_PER_CALL)
    return found


def _layer_names(keys: Iterable[str]) -> list[str]:
    known = set(keys)
    names = [key.removesuffix(".absmax") for key in known if key.endswith(".absmax")]
    return sorted(name for name in names if f"{name}.rows" in known)
