"""The headless browser that tests use: chromium, node and playwright-core. Stdlib only.

playwright-core lies in tests/browser/node_modules (ignored by git), where `npm install` puts it;
./test does that where npm can. CHROMIUM names another chromium.
"""

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "browser"
NOT_FOUND = "browser tests skipped: chromium or playwright-core not found"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_INSTALL_TIMEOUT_S = 120


@dataclass(frozen=True)
class Browser:
    """Paths of the two programs."""

    chromium: str
    node: str


def find_programs() -> Browser | None:
    """chromium and node, or None without one of them."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    node = shutil.which("node")
    return Browser(chromium, node) if chromium and node else None


def find() -> Browser | None:
    """The programs with playwright-core beside the scripts, or None: skip with NOT_FOUND."""
    package = FOLDER / "node_modules" / "playwright-core" / "package.json"
    return find_programs() if package.is_file() else None


def install() -> Browser | None:
    """find(), after `npm install` if playwright-core is missing and npm can reach its registry."""
    if find() is None and find_programs() is not None and shutil.which("npm"):
        command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, cwd=FOLDER, capture_output=True, timeout=_INSTALL_TIMEOUT_S)
    return find()
