"""Kernels from optional packages: imported once, when first asked for, or a reason why not.

A subclass says in `load` what it needs from its package; `available` turns a package that is
missing, broken or of another version into a sentence that ends with what to do.
"""

import os
import shutil
import sys
from importlib import metadata

from ...errors import SlipstreamError

# What a wheel for another torch or CUDA raises: a symbol, a shared library, a version check.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)


class UnavailableError(SlipstreamError):
    """The package is there but not usable; its text is the reason."""


class PackageKernel:
    """A kernel from a package. package: its import name; title: its name in sentences."""

    id: str
    package: str
    title: str
    pip: str

    def __init__(self) -> None:
        self._asked = False
        self._reason: str | None = None

    def load(self) -> None:
        """Import the package and keep its functions. Raises UnavailableError with a reason."""
        raise NotImplementedError

    def available(self) -> str | None:
        """None, or why this kernel cannot be had here, ending with what to do about it."""
        if not self._asked:
            self._reason = self._try_load()
            self._asked = True
        return self._reason

    def _try_load(self) -> str | None:
        try:
            self.load()
        except UnavailableError as reason:
            return str(reason)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.split(".")[0] == self.package:
                return f"{self.title} is not installed. {self.pip}"
            return f"{self.title} cannot be imported ({error}). {self.pip}"
        except BROKEN as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            return f"{self.title} is installed but cannot be imported ({text[0]}). {self.pip}"
        return None


def version_of(distribution: str) -> str:
    """Installed version, "an unknown version" if the package says none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "an unknown version"


def require_c_compiler(name: str) -> None:
    """Triton builds a launcher with a C compiler at run time (Windows builds bring their own)."""
    if sys.platform == "win32" or os.environ.get("CC"):
        return
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        raise UnavailableError(
            f"{name} runs on Triton, which needs a C compiler at run time and found none. "
            "Install gcc, or set CC"
        )
