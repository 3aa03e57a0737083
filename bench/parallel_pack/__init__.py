"""A node of the private server of `python bench parallel`: random CONDITIONING without a CLIP."""

from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io


class SlipstreamBenchPrompt(io.ComfyNode):
    """What a CLIPTextEncode is to other models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamBenchPrompt",
            display_name="Bench Prompt",
            category="slipstream/bench",
            is_dev_only=True,
            inputs=[
                io.Int.Input("tokens", default=77, min=1, max=4096),
                io.Int.Input("width", default=2048, min=1, max=8192),
                io.Int.Input("pooled", default=1280, min=1, max=8192),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens: int, width: int, pooled: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(1, tokens, width, generator=generator)
        fields = {"pooled_output": torch.randn(1, pooled, generator=generator)}
        return io.NodeOutput([[text, fields]])


class _Nodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SlipstreamBenchPrompt]


async def comfy_entrypoint() -> Any:
    return _Nodes()
