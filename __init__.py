"""ComfyUI-Slipstream: attention, caching, offload, SVDQuant and sequence parallel for any MODEL.

ComfyUI imports this file and asks for the extension; nothing else happens at import.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint() -> object:
    from .nodes import SlipstreamExtension

    return SlipstreamExtension()
