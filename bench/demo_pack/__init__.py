"""The demo's own node pack, linked into the private server of `./run` only; never into the pack."""

from typing import Any


async def comfy_entrypoint() -> Any:
    from .nodes import DemoExtension

    return DemoExtension()
