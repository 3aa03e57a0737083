"""Nodes that only tests need; never shipped."""


async def comfy_entrypoint():
    from .nodes import TestPackExtension

    return TestPackExtension()
