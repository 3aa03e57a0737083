"""SlipstreamLayerOffload: widgets to OffloadConfig."""

from typing import Any

from comfy_api.latest import io

from ..backends.offload.apply import apply_offload
from ..backends.offload.config import MODES, OffloadConfig


class SlipstreamLayerOffload(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamLayerOffload",
            display_name="Slipstream Layer Offload",
            category="model/patch/slipstream",
            description=(
                "Output-preserving. A VRAM budget for this model, and its next block copied ahead "
                "where that is measured to be faster; ComfyUI's own memory manager streams."
            ),
            search_aliases=[
                "block swap", "blockswap", "blocks to swap", "offload", "layerwise offload",
                "low vram", "vram budget", "vram limit", "reserve vram", "distorch", "memory",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to limit. A clone is returned."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip=(
                        "auto: residency is your budget, otherwise ComfyUI's own; blocks are "
                        "copied ahead where a measured step gets 3 % shorter by it. speed: always "
                        "copies ahead, unless steps get longer. memory: the fewest resident "
                        "weights whose copies still hide behind computing. manual: exactly the "
                        "two numbers below. off: as without the node."
                    ),
                ),
                io.Float.Input(
                    "vram_budget_gb", default=0.0, min=0.0, max=512.0, step=0.1,
                    tooltip=(
                        "GiB for this model's weights and the buffers it streams through; an upper "
                        "bound in every mode. 0: the mode decides. Activations come on top."
                    ),
                ),
                io.Float.Input(
                    "prefetch", default=0.0, min=-1.0, max=512.0, step=0.05, optional=True,
                    advanced=True,
                    tooltip=(
                        "Blocks copied ahead of the running one: 0 is one block, below 1 that "
                        "share of the blocks, 1 and above that many; each costs one block of VRAM "
                        "(0.7 GB for Wan 14B in bf16). -1: ComfyUI's own streaming per module."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched MODEL: wire it to any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, mode: str, vram_budget_gb: float, prefetch: float = 0.0
    ) -> io.NodeOutput:
        config = OffloadConfig(mode=mode, vram_budget_gb=vram_budget_gb, prefetch=prefetch)
        return io.NodeOutput(apply_offload(model, config))
