"""The unpacked copies that SVDQuant Loader keeps: list them, delete them.

./run --svdquant-cache [FOLDER]
./run --svdquant-cache-delete NAME|all      (with --svdquant-cache FOLDER: in that folder)

Without FOLDER it is the folder of the ComfyUI that ./run finds: models/slipstream_cache, or what
`slipstream_cache` in its extra_model_paths.yaml names. A server that was started with options of
its own for folders says in its log where a copy is.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ..backends.svdquant import host_cache
from ..backends.svdquant.technique import size_text


def run(options: argparse.Namespace) -> int:
    """What ./run's two options ask for; the exit code."""
    folder = Path(options.svdquant_cache) if options.svdquant_cache else None
    if folder is None:
        if not options.comfyui:
            print(
                "No ComfyUI found: name its folder with --comfyui, or the copies' folder with "
                "--svdquant-cache FOLDER",
                file=sys.stderr,
            )
            return 1
        folder = folder_of(Path(options.comfyui))
    print("\n".join(listing(folder)))
    if not options.svdquant_cache_delete:
        return 0
    lines, is_done = deleted(folder, options.svdquant_cache_delete)
    print("\n".join(lines), file=sys.stdout if is_done else sys.stderr)
    return 0 if is_done else 1


def folder_of(comfyui: Path) -> Path:
    """Where a ComfyUI that is started without options for folders keeps copies."""
    sys.path.insert(0, str(comfyui))
    extra = comfyui / "extra_model_paths.yaml"
    if extra.is_file():
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(extra))
    found = host_cache.cache_folder()
    assert found is not None
    return found


def listing(folder: Path) -> list[str]:
    """A line per copy, and what they take together."""
    copies = host_cache.kept(folder)
    lines = [f"{len(copies)} unpacked copies in {folder}"]
    for copy in copies:
        state = "" if copy.source.exists() else "  (not there now)"
        lines.append(f"  {size_text(copy.num_bytes):>9}  {copy.path.name}")
        lines.append(f"             of {copy.source}{state}")
    if copies:
        total = size_text(sum(copy.num_bytes for copy in copies))
        free = size_text(shutil.disk_usage(folder).free)
        lines.append(f"  {total:>9}  together; {free} are free on this disk")
    return lines


def deleted(folder: Path, name: str) -> tuple[list[str], bool]:
    """Delete one copy by name, or all; what happened, and whether all went."""
    copies = host_cache.kept(folder)
    chosen = [copy for copy in copies if name in ("all", copy.path.name, copy.path.stem)]
    if not chosen and name != "all":
        return [f"There is no copy '{name}': choose a name of the list, or all."], False
    lines, is_done = [], True
    for copy in chosen:
        problem = host_cache.delete(copy.path)
        is_done = is_done and not problem
        lines.append(f"{copy.path.name}: {problem or 'deleted, ' + size_text(copy.num_bytes)}")
    return lines or ["Nothing to delete."], is_done
