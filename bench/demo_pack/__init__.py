"""The demo's own node pack, linked into the private server of `./run` only; never into the pack."""


async def comfy_entrypoint():
    from .nodes import DemoExtension

    return DemoExtension()
