"""Unpacked copies of SVDQuant files: where they are kept, when one is made, when one goes (0.33).

The folder is `slipstream_cache` in ComfyUI's models folder, because a copy is as large as a model
and wants the same disk; a `slipstream_cache` entry in extra_model_paths.yaml moves it. Nothing
here ends a load: what cannot be kept is said, and the load goes on without a copy.
"""

import hashlib
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from . import repacked
from .assemble import Assembled
from .dialects import Checkpoint
from .layout import wrap_buffer
from .technique import size_text

log = logging.getLogger("slipstream")
FOLDER = "slipstream_cache"
SMALLEST_BYTES = 200_000_000  # of a source: less is unpacked within a second
KEPT_FREE_BYTES = 20_000_000_000  # on the disk, or a tenth of it if that is less
OFF = "off by the widget keep_unpacked"
_SEALING = "slipstream-svdquant-copy"


@dataclass(frozen=True)
class Found:
    """state: the model's tensors, mapped from a copy, or None; sentence: for log and report."""

    state: dict[str, torch.Tensor] | None
    sentence: str = ""


def cache_folder() -> Path | None:
    """Where copies are kept; None outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return None
    moved, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    return Path(moved[0]) if moved else Path(folder_paths.models_dir) / FOLDER


def find_or_make(
    checkpoint: Checkpoint, dtype: torch.dtype, unpack: Callable[[], Iterator[Assembled]]
) -> Found:
    """The model's tensors from its copy, which is made first if there is none yet.

    unpack: starts to yield the source's tensors; called at most once, and what it raises passes.
    """
    from safetensors import SafetensorError

    folder, source = cache_folder(), first_source(checkpoint)
    if folder is None or checkpoint.header.size < SMALLEST_BYTES:
        return Found(None)
    remove_orphans(folder)
    path = folder / copy_name(source, dtype)
    made_from = repacked.identity(sorted(checkpoint.header.paths), dtype)
    copy = _checked(path, made_from)
    verb, problem, found = "opened from its", "", None
    if copy is None:
        verb, problem = "made a", _make(folder, path, made_from, checkpoint, unpack)
        copy = None if problem else _checked(path, made_from, is_known_whole=True)
    if copy is not None:
        try:
            found = _mapped(copy, dtype)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            problem = f"{path.name} cannot be mapped ({error})"
    if found is None:
        sentence = f"loaded without a copy for fast loading: {problem or 'see the log'}"
        log.warning("SVDQuant: %s: %s", source.name, sentence)
        return Found(None, sentence)
    sentence = f"{verb} {_size(path)} copy for fast loading in {folder.name}; {OFF}"
    log.info("SVDQuant: %s: %s (%s)", source.name, sentence, path)
    return Found(found, sentence)


def first_source(checkpoint: Checkpoint) -> Path:
    """The file that a copy is named by: the same whichever half of a model was asked for."""
    return min(checkpoint.header.paths).resolve()


def copy_name(source: Path, dtype: torch.dtype) -> str:
    """One name per source and dtype: a changed source replaces its copy."""
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{source.stem}-{kind}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}.safetensors"
    )


def _checked(path: Path, made_from: str, *, is_known_whole: bool = False) -> repacked.Copy | None:
    """A copy that may be used; None, with a line in the log, if there is none."""
    if not path.is_file():
        return None
    try:
        return repacked.open_copy(path, made_from, is_known_whole=is_known_whole)
    except repacked.DamagedError as error:
        log.info("SVDQuant: %s is made again: %s", path.name, error)
        return None


def _mapped(copy: repacked.Copy, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a copy as ComfyUI maps those of any model file."""
    import comfy.utils

    tensors, state = comfy.utils.load_torch_file(str(copy.header.path)), {}
    for name in copy.names:
        layer, tensor = copy.layers.get(name), tensors[name]
        if layer is not None:
            tensor = wrap_buffer(tensor, layer.places, layer.shape, dtype)
        state[name] = tensor
    return state


def _make(
    folder: Path,
    path: Path,
    made_from: str,
    checkpoint: Checkpoint,
    unpack: Callable[[], Iterator[Assembled]],
) -> str:
    """Write a copy; why it could not be, or nothing. Whatever ends it early leaves no file."""
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _writing(folder) as is_ours:
            if not is_ours:
                return "another process is writing one"
            for left in folder.glob("*.part"):  # of a process that was killed: we hold the lock
                left.unlink()
            problem = _no_room(folder, path, checkpoint)
            if problem:
                return problem
            try:
                with part.open("wb") as file:
                    sealed = repacked.write(
                        file,
                        unpack(),
                        num_tensors=len(checkpoint.layers) + len(checkpoint.dense),
                        source=first_source(checkpoint),
                        made_from=made_from,
                    )
                part.replace(path)
                _seal_later(path, sealed)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return ""


def _seal_later(path: Path, sealed: int) -> None:
    """Wait for the disk beside the load: 13 GB take half a minute where 400 MB go a second.

    If this process ends before, the next load compares the checksums.
    """

    def seal() -> None:
        try:
            repacked.seal(path, sealed)
        except OSError as error:
            log.warning("SVDQuant: %s did not come to the disk: %s", path.name, error)
            path.unlink(missing_ok=True)

    thread = threading.Thread(target=seal, name=_SEALING, daemon=True)
    thread.start()


def settle() -> None:
    """Wait until copies that this process has written are on the disk."""
    for thread in threading.enumerate():
        if thread.name == _SEALING:
            thread.join()


def _no_room(folder: Path, path: Path, checkpoint: Checkpoint) -> str:
    """Why there is no room for a copy, or nothing. One that is replaced gives its room back last"""
    disk = shutil.disk_usage(folder)
    needed = int(checkpoint.header.size * 1.1)
    kept_free = min(KEPT_FREE_BYTES, disk.total // 10)
    if path.is_file() and disk.free - needed < kept_free:
        path.unlink()  # of another source or version: of no use any more
        disk = shutil.disk_usage(folder)
    if disk.free - needed >= kept_free:
        return ""
    return (
        f"it needs {size_text(needed)}, {folder} has {size_text(disk.free)} free, and "
        f"{size_text(kept_free)} are left alone. Free some, or move {FOLDER} in "
        "extra_model_paths.yaml"
    )


@contextmanager
def _writing(folder: Path) -> Iterator[bool]:
    """Whether this process may write here; the lock ends with the process, however it ends."""
    with (folder / ".lock").open("ab") as file:
        is_ours = _locked(file)
        yield is_ours


def _locked(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# ---- listing and deleting ----
@dataclass(frozen=True)
class Kept:
    """One copy in a folder."""

    path: Path
    source: Path
    num_bytes: int


def kept(folder: Path) -> list[Kept]:
    """All copies in a folder, by name; other files are not ours to touch."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        info = repacked.read_info(path)
        if info is not None:
            found.append(Kept(path, Path(info["source"]), path.stat().st_size))
    return found


def remove_orphans(folder: Path) -> None:
    """Delete copies whose source is gone; a source on a disk that is not there is not gone."""
    for copy in kept(folder):
        if copy.source.parent.is_dir() and not copy.source.exists():
            problem = delete(copy.path)
            what = problem or f"deleted, {size_text(copy.num_bytes)}: its source is gone"
            log.info("SVDQuant: the copy %s is %s", copy.path, what)


def delete(path: Path) -> str:
    """Delete a copy; why it could not be, or nothing. On Linux a model that uses it goes on."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return (
            f"not deleted ({error.strerror or error}): if a running ComfyUI has the model loaded, "
            "stop it and delete again"
        )
    return ""


def _size(path: Path) -> str:
    return size_text(path.stat().st_size)
