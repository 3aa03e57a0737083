"""SlipstreamSequenceParallel: widgets to SequenceParallelConfig."""

from typing import Any

from comfy_api.latest import io

from ..parallel.apply import apply_parallel
from ..parallel.config import MAX_WORKERS, SequenceParallelConfig


class SlipstreamSequenceParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamSequenceParallel",
            display_name="Slipstream Sequence Parallel",
            category="model/patch/slipstream",
            description=(
                "Output-preserving. Shares every sampling step over several GPUs: each has the "
                "whole model and some images of a batch, one of the two prompts, or a part of the "
                "tokens. Sampler, previews, LoRA and ControlNet nodes stay as they are. Batches "
                "and prompts of any model, SDXL too; tokens of transformers (Wan, Flux, "
                "HunyuanVideo, Qwen-Image, SD3, LTX, Z-Image, ...)."
            ),
            search_aliases=[
                "multi gpu", "multigpu", "sequence parallel", "ulysses", "ring attention",
                "context parallel", "cfg parallel", "data parallel", "batch", "xdit", "raylight",
                "usp",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to share. A clone is returned."),
                io.Int.Input(
                    "workers", default=0, min=0, max=MAX_WORKERS,
                    tooltip=(
                        "Processes, ComfyUI's own included. 0: one per GPU of the same kind, and "
                        "one alone where that is faster. 1: the model runs as without this node."
                    ),
                ),
                io.String.Input(
                    "devices", default="",
                    tooltip=(
                        "Device of each process, ComfyUI's own first: cuda:0,cuda:1. Empty: GPUs "
                        "of the same kind. cpu may repeat (cpu,cpu): for trying it out."
                    ),
                ),
                io.Int.Input(
                    "ulysses", default=0, min=0, max=MAX_WORKERS, optional=True, advanced=True,
                    tooltip=(
                        "Processes that exchange attention heads; at most as many as the model "
                        "has heads. 0: as many as fit."
                    ),
                ),
                io.Int.Input(
                    "ring", default=0, min=0, max=MAX_WORKERS, optional=True, advanced=True,
                    tooltip="Groups that pass keys around, for more processes than heads. 0: auto.",
                ),
                io.Int.Input(
                    "cfg", default=0, min=0, max=2, optional=True, advanced=True,
                    tooltip=(
                        "2: positive and negative prompt on two halves of the processes. 1: never. "
                        "0: 2 where there are two prompts and an even number of processes."
                    ),
                ),
                io.Int.Input(
                    "timeout_s", default=60, min=1, max=86400, optional=True, advanced=True,
                    tooltip=(
                        "Longest wait for a process at one exchange, in seconds; then the run "
                        "stops with an error, and the next prompt starts a new process."
                    ),
                ),
                io.Int.Input(
                    "idle_s", default=900, min=0, max=604800, optional=True, advanced=True,
                    tooltip=(
                        "Unused processes end after so many seconds and free their memory; the "
                        "next prompt starts them again (some seconds). 0: never."
                    ),
                ),
                io.Int.Input(
                    "batch", default=0, min=0, max=MAX_WORKERS, optional=True, advanced=True,
                    tooltip=(
                        "Images of a batch (and prompts that ComfyUI merges) on so many groups of "
                        "processes; needs no exchange inside a step. 0: as many as there are rows, "
                        "before tokens are shared. 1: never."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched MODEL: wire it to any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        workers: int,
        devices: str,
        ulysses: int = 0,
        ring: int = 0,
        cfg: int = 0,
        timeout_s: int = 60,
        idle_s: int = 900,
        batch: int = 0,
    ) -> io.NodeOutput:
        config = SequenceParallelConfig(
            workers=workers, devices=devices, ulysses=ulysses, ring=ring, cfg=cfg,
            batch=batch, timeout_s=timeout_s, idle_s=idle_s,
        )  # fmt: skip
        return io.NodeOutput(apply_parallel(model, config))
