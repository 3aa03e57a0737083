"""The server that tests use: our pack and the test pack on the ComfyUI that tests found."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy_home
from slipstream.bench.server import Server, ServerError, free_port

TEST_PACK = Path(__file__).resolve().parent / "testpack"
PACKS = {"slipstream": comfy_home.PACK_ROOT, "slipstream_testpack": TEST_PACK}

__all__ = ["PACKS", "TEST_PACK", "Server", "ServerError", "free_port", "isolated_server"]


def isolated_server(
    *,
    models: Path | None = None,
    packs: Mapping[str, Path] = PACKS,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Server:
    """A CPU server with `packs`, to be started by `with`. Raises ComfyUIError without a ComfyUI."""
    root = comfy_home.find()
    if root is None:
        raise comfy_home.ComfyUIError(comfy_home.NOT_FOUND)
    return Server(
        root, packs=packs, models=models, arguments=arguments, environment=environment or {}
    )
