"""SVDQuant's sides: the subject's own file, calibrated, converted and loaded as the nodes do it.

A width of 128 flatters the rank and wastes the kernels: expect quality to be read here, and time
on a GPU (`python bench svdquant_flux`).
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from .subjects import Subject
from .variants import OURS, Make, NotHereError, Variant

RANK = 16
_CALIBRATION_RUNS = range(1000, 1004)  # numbers that no measured run has


def svdquant() -> tuple[Variant, ...]:
    """What a user gets (auto), and the backend whose result is closest to the 16-bit model."""
    about = (
        f"rank {RANK}, calibrated; a CPU has no 4-bit kernels: auto emulates their arithmetic, "
        "dequant unpacks every layer first"
    )
    files = Files()

    def loaded(backend: str) -> Make:
        def make(subject: Subject) -> Any:
            from ..backends.svdquant.host import load_svdquant

            if backend == "auto" and subject.decode is None and not torch.cuda.is_available():
                raise NotHereError("emulating the kernels takes long, and there is no picture here")
            return load_svdquant(str(files.of(subject)), {"backend": backend})

        return make

    return tuple(
        Variant(f"SVDQuant int4, {backend}", OURS, "svdquant", loaded(backend), about=about)
        for backend in ("auto", "dequant")
    )


class Files:
    """Converted files, one for each file that a subject was loaded from; gone with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-svdquant-")
        self._known: dict[Path, Path] = {}

    def of(self, subject: Subject) -> Path:
        """The subject's file in 4 bits. Raises ValueError for a family that SVDQuant lacks."""
        source = _file(subject.model)
        if source not in self._known:
            target = Path(self._folder.name) / f"{len(self._known)}.safetensors"
            self._known[source] = _convert(source, target, subject)
        return self._known[source]


def _convert(source: Path, target: Path, subject: Subject) -> Path:
    from ..backends.svdquant.calibrate import apply_calibrate
    from ..backends.svdquant.config import ConvertConfig
    from ..backends.svdquant.convert import convert
    from ..backends.svdquant.statistics import load_statistics

    recorded = target.with_suffix(".statistics")
    model = apply_calibrate(subject.model, recorded)
    for number in _CALIBRATION_RUNS:
        subject.run(model, number)
    statistics = load_statistics(recorded)
    return convert(source, target, ConvertConfig(rank=RANK), statistics=statistics)


def _file(model: Any) -> Path:
    """The file that a core loader read."""
    recipe = getattr(model, "cached_patcher_init", None)
    path = Path(str(recipe[1][0])) if recipe else None
    if path is None or not path.is_file():
        raise NotHereError("needs a model that was loaded from a file")
    return path
