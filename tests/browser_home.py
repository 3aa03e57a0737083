"""The headless browser that tests use: chromium, node and playwright-core. Stdlib only.

playwright-core is looked for in tests/browser/node_modules and .slipstream/node/node_modules; both
are ignored by git. `npm install playwright-core` in either makes it; ./test does the second.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

PACK_ROOT = Path(__file__).resolve().parents[1]
OWN_NODE = PACK_ROOT / ".slipstream" / "node"
NOT_FOUND = "browser tests skipped: chromium or playwright-core not found"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")


@dataclass(frozen=True)
class Browser:
    """Paths of the programs, and the folder whose `playwright-core` a script imports."""

    chromium: str
    node: str
    node_modules: Path


def find_programs() -> tuple[str, str] | None:
    """(chromium, node); CHROMIUM_PATH names another chromium."""
    chromium = os.environ.get("CHROMIUM_PATH") or next(
        filter(None, map(shutil.which, _BROWSERS)), None
    )
    node = shutil.which("node")
    return (chromium, node) if chromium and node else None


def find() -> Browser | None:
    """All three, or None: skip with NOT_FOUND."""
    programs = find_programs()
    folders = (PACK_ROOT / "tests" / "browser" / "node_modules", OWN_NODE / "node_modules")
    modules = next((f for f in folders if (f / "playwright-core" / "package.json").is_file()), None)
    if programs is None or modules is None:
        return None
    return Browser(*programs, modules)
