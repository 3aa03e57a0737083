"""Optional packages that are installed and cannot be imported, as a mismatched wheel is."""

from collections.abc import Iterable
from pathlib import Path

# Kernel packages and other optional imports of the pack that ComfyUI does not need itself.
OPTIONAL = (
    "cache_dit",
    "diffusers",
    "flash_attn",
    "flash_attn_interface",
    "nunchaku",
    "ray",
    "sageattention",
    "sageattn3",
    "spas_sage_attn",
    "xformers",
)
# ComfyUI 0.33 imports these at start (comfy/ldm/modules/attention.py) and expects ImportError only.
COMFYUI_DIES_OF = {"flash_attn", "sageattention", "sageattn3"}
ERRORS = ("ImportError", "OSError", "RuntimeError", "TypeError")


def broken_packages(folder: Path, error: str, names: Iterable[str] = OPTIONAL) -> Path:
    """A folder for PYTHONPATH where `names` are installed (2.2.0) and raise `error` at import."""
    root = folder / f"broken-{error}"
    for name in names:
        package = root / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            f'raise {error}("undefined symbol: a faked broken {name}")\n'
        )
        metadata = root / f"{name}-2.2.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.2.0\n")
    return root
