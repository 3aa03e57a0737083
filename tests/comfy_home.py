"""The ComfyUI checkout that tests run against, and the pack under its test name."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACK_ROOT = Path(__file__).resolve().parents[1]
NOT_FOUND = (
    "ComfyUI not found: set COMFYUI_PATH to a ComfyUI checkout (0.33 or newer) "
    "or install one with comfy-cli, whose default place is ~/comfy/ComfyUI"
)
OLDEST = (0, 33)


class ComfyUIError(Exception):
    """COMFYUI_PATH, or the checkout it names, cannot be used."""


def find() -> Path | None:
    """COMFYUI_PATH, else comfy-cli's default place; None if neither, an error if it is wrong."""
    named = os.environ.get("COMFYUI_PATH")
    root = Path(named).expanduser() if named else Path.home() / "comfy" / "ComfyUI"
    if not (root / "comfy" / "model_patcher.py").is_file():
        if named:
            raise ComfyUIError(
                f"COMFYUI_PATH={named} has no comfy/model_patcher.py: "
                "point it at the checkout's root"
            )
        return None
    version = _version(root)
    if version < OLDEST:
        shown = ".".join(map(str, version))
        raise ComfyUIError(f"ComfyUI {shown} found at {root}, 0.33 or newer needed")
    return root.resolve()


def _version(root: Path) -> tuple[int, ...]:
    text = (root / "comfyui_version.py").read_text()
    return tuple(int(part) for part in text.split('"')[1].split(".")[:2])


def in_process() -> Path | None:
    """Make `import comfy` work in this process, on the CPU; None without a ComfyUI.

    The arguments are set before comfy.model_management is imported: device and attention
    function are picked at its import (on a CPU the default would be sub-quadratic, not SDPA).
    """
    root = find()
    if root is None:
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True
    return root


def load_pack(alias: str = "slipstream") -> ModuleType:
    """Import the pack under `alias` as ComfyUI does: by path, its root never on sys.path."""
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(
        alias, PACK_ROOT / "__init__.py", submodule_search_locations=[str(PACK_ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module
