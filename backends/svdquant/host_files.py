"""ComfyUI's folders and progress bar for the SVDQuant nodes that read and write files (0.33)."""

import re
from pathlib import Path
from typing import Any

from .config import ConvertConfig, SVDQuantConfig
from .convert import convert
from .dialects import detect
from .errors import CheckpointError
from .halves import read_model_header
from .host_detection import title_of
from .host_dtype import pick_dtypes
from .inspection import inspect_text
from .statistics import load_statistics


def model_names() -> list[str]:
    """Names in ComfyUI's diffusion_models folders, for a widget."""
    import folder_paths

    return folder_paths.get_filename_list("diffusion_models")


def model_path(name: str) -> Path:
    """The path of a model file. Raises CheckpointError if it is not there."""
    import folder_paths

    found = folder_paths.get_full_path("diffusion_models", name)
    if found is None:
        raise CheckpointError(f"{name} is not in a diffusion_models folder: refresh the list")
    return Path(found)


def statistics_path(name: str) -> Path:
    """Where the calibration of this name is kept: ComfyUI's user folder.

    Raises ValueError for a name that is not a plain file name.
    """
    import folder_paths

    if not re.fullmatch(r"[\w][\w .()+-]{0,99}", name):
        raise ValueError(
            f"'{name}' is no name for a calibration: use letters, digits, spaces, - _ . ( ) +"
        )
    return (
        Path(folder_paths.get_user_directory()) / "slipstream" / "svdquant" / f"{name}.safetensors"
    )


def inspect_model(name: str) -> str:
    """What a model file is, and which backends can run it here."""
    import comfy.model_management

    checkpoint = detect(read_model_header(model_path(name)))
    device = comfy.model_management.get_torch_device()
    compute = pick_dtypes(checkpoint, SVDQuantConfig(), device).compute
    return inspect_text(checkpoint, device, compute, title_of(checkpoint))


def convert_model(
    name: str, config: ConvertConfig, *, statistics: str, file_name: str, overwrite: bool = False
) -> str:
    """Converts a model file beside itself, or under `file_name`; returns the new name.

    statistics: the name of a calibration, or "" for none. Can be interrupted like a sampler.
    """
    import comfy.model_management
    import comfy.utils

    source = model_path(name)
    target = target_path(source, config, file_name)
    if target == source:
        raise ValueError(f"{target.name} is the source itself: choose another file name")
    recorded = load_statistics(statistics_path(statistics)) if statistics else None
    bar: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(comfy.utils.ProgressBar(total))
        bar[0].update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    device = comfy.model_management.get_torch_device()
    convert(
        source,
        target,
        config,
        statistics=recorded,
        device=device,
        progress=progress,
        overwrite=overwrite,
    )
    return target.name


def target_path(source: Path, config: ConvertConfig, file_name: str) -> Path:
    """Beside the source: as named, else svdq-<precision>_r<rank>-<source>.

    Raises ValueError for a name with a folder.
    """
    precision = "fp4" if config.precision == "nvfp4" else "int4"
    chosen = file_name.strip() or f"svdq-{precision}_r{config.rank}-{source.stem}"
    if Path(chosen).name != chosen or chosen.startswith("."):
        raise ValueError(f"file name '{chosen}': give a name without a folder")
    suffix = "" if chosen.endswith(".safetensors") else ".safetensors"
    return source.with_name(chosen + suffix)
