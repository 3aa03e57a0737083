"""SVDQuant CLIP Loader: 4-bit text encoders. Widgets to a config and file names."""

from comfy_api.latest import io

from ..backends.svdquant import host_text
from ..backends.svdquant.config import BACKENDS, DTYPES, SVDQuantConfig

NONE = "none"


class SlipstreamSVDQuantCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = host_text.text_encoder_names()
        return io.Schema(
            node_id="SlipstreamSVDQuantCLIPLoader",
            display_name="Slipstream SVDQuant CLIP Loader",
            category="model/loaders/slipstream",
            description=(
                "Approximate. Loads a 4-bit text encoder (Nunchaku's AWQ T5, or any text encoder "
                "in comfy-kitchen's SVDQuant or AWQ form) as an ordinary CLIP, alone or with a "
                "16-bit one: prompts, LoRA and Set Last Layer work as on any CLIP."
            ),
            search_aliases=["nunchaku text encoder", "awq t5", "4-bit clip", "load clip quantized"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "clip_name1",
                    options=files,
                    tooltip="A file in the text_encoders folder. One of the two must be 4-bit.",
                ),
                io.Combo.Input(
                    "type",
                    options=host_text.clip_types(),
                    default="flux",
                    tooltip="Which model the text is for, as in Load CLIP and DualCLIPLoader.",
                ),
                io.Combo.Input(
                    "clip_name2",
                    options=[NONE, *files],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "A second text encoder, 4-bit or not, where the model has two: clip_l for "
                        "FLUX.1. The order does not matter."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "auto: 4-bit weights are unpacked while their layer runs. kitchen, "
                        "nunchaku: 4-bit kernels, which need dtype bf16 or fp16 on a GPU."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What 4-bit layers compute in. auto: fp32, as ComfyUI computes every text "
                        "encoder. T5 overflows fp16."
                    ),
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The CLIP: wire it as from Load CLIP.")],
        )

    @classmethod
    def execute(
        cls,
        clip_name1: str,
        type: str,
        clip_name2: str = NONE,
        backend: str = "auto",
        dtype: str = "auto",
    ) -> io.NodeOutput:
        config = SVDQuantConfig(backend=backend, dtype=dtype)
        names = [clip_name1, *([] if clip_name2 == NONE else [clip_name2])]
        paths = [host_text.text_encoder_path(name) for name in names]
        return io.NodeOutput(host_text.load_clip(paths, type, config.to_json()))
