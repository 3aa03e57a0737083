"""Kernels from optional packages: imported once, when first asked for, or a reason why not.

`available` imports the package, and turns one that is missing, broken or of another version into
a sentence that ends with what to do. A subclass says in `load` what it needs from the package.
"""

import os
import shutil
import sys
from functools import cache
from importlib import import_module, metadata
from typing import Any

from ...errors import SlipstreamError

TRITON = ("triton", "triton-windows")  # one of them; on Windows pip has the second


class UnavailableError(SlipstreamError):
    """The package is there but not usable; its text is the reason."""


class PackageKernel:
    """A kernel from a package.

    package: the module to import; title: the package's name in sentences; distributions: names
    under which pip knows what the kernel's speed depends on, whichever of them are installed.
    """

    id: str
    package: str
    title: str
    pip: str
    distributions: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._asked = False
        self._reason: str | None = None

    def load(self, package: Any) -> None:
        """Keep the imported package's functions. Raises UnavailableError with a reason."""
        raise NotImplementedError

    def available(self) -> str | None:
        """None, or why this kernel cannot be had here, ending with what to do about it."""
        if not self._asked:
            self._reason = self._try_load()
            self._asked = True
        return self._reason

    def _try_load(self) -> str | None:
        try:
            package = import_module(self.package)
        except Exception as error:  # noqa: BLE001 - a wheel for another torch raises anything
            own = self.package.split(".")
            parents = {".".join(own[: i + 1]) for i in range(len(own))}
            if isinstance(error, ModuleNotFoundError) and error.name in parents:
                return f"{self.title} is not installed. {self.pip}"
            return f"{self.title} is installed but cannot be imported ({_said(error)}). {self.pip}"
        try:
            self.load(package)
        except UnavailableError as reason:
            return str(reason)
        except Exception as error:  # noqa: BLE001 - a version with other functions
            return f"{self.title} is installed but cannot be used ({_said(error)}). {self.pip}"
        return None


def _said(error: Exception) -> str:
    """'ImportError: libcudart.so.12: cannot open shared object file'."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def version_of(distribution: str) -> str:
    """Installed version, "an unknown version" if the package says none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "an unknown version"


@cache
def versions_of(distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed; looked up once, it takes milliseconds."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def require_c_compiler(name: str) -> None:
    """Triton builds a launcher with a C compiler at run time (Windows builds bring their own)."""
    if sys.platform == "win32" or os.environ.get("CC"):
        return
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        raise UnavailableError(
            f"{name} runs on Triton, which needs a C compiler at run time and found none. "
            "Install gcc, or set CC"
        )
