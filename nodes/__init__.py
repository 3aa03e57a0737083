"""The pack's nodes. A new node is one import and one line in NODES; its id never changes."""

from comfy_api.latest import ComfyExtension, io

from .attention import SlipstreamAttention
from .cache import SlipstreamCache, SlipstreamCacheDiT
from .offload import SlipstreamLayerOffload
from .parallel import SlipstreamSequenceParallel
from .prompts import SlipstreamPromptBatch
from .report import SlipstreamReport
from .svdquant import (
    SlipstreamSVDQuantCalibrate,
    SlipstreamSVDQuantConvert,
    SlipstreamSVDQuantInspect,
    SlipstreamSVDQuantLoader,
)
from .svdquant_clip import SlipstreamSVDQuantCLIPLoader

NODES: list[type[io.ComfyNode]] = [
    SlipstreamAttention,
    SlipstreamCache,
    SlipstreamCacheDiT,
    SlipstreamLayerOffload,
    SlipstreamPromptBatch,
    SlipstreamReport,
    SlipstreamSequenceParallel,
    SlipstreamSVDQuantLoader,
    SlipstreamSVDQuantInspect,
    SlipstreamSVDQuantCalibrate,
    SlipstreamSVDQuantConvert,
    SlipstreamSVDQuantCLIPLoader,
]


class SlipstreamExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
