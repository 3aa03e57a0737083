"""A folder of packages that pip fills once and again after a week, for tiers that want the newest.

Stdlib only. It lies in front of the packages of whatever Python uses it, which stays as it is.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import comfy_home

comfy_home.load_pack()
from slipstream.bench import install, setup_env  # noqa: E402

FRESH_S = 7 * 24 * 3600  # "newest" is asked for again after a week


def renew(
    python: str, folder: Path, calls: Iterable[Sequence[str]], *, without: Sequence[str] = ()
) -> None:
    """Fill `folder` with each of pip's arguments in `calls`, if it is not fresh.

    without: patterns of files in it that are not wanted. What is there stays if pip fails; raises
    SetupError with pip's reason if nothing is there.
    """
    done = done_file(folder)
    if done.exists() and time.time() - done.stat().st_mtime < FRESH_S:
        return
    print(f"Installing into {folder}", flush=True)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for arguments in calls:
            install.pip_install(python, arguments, target=new)
    except setup_env.SetupError as error:
        if not done.exists():
            raise
        print(f"{folder.name} stays as it is: {error}", file=sys.stderr)
        return
    for pattern in without:
        for file in new.glob(pattern):
            file.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    done.touch()


def done_file(folder: Path) -> Path:
    """The file whose age is that of `folder`'s packages."""
    return folder.with_name(f"{folder.name}.done")
