"""SVDQuant nodes: load, inspect, calibrate, convert. Widgets to configs and names."""

from typing import Any

from comfy_api.latest import io

from ..backends.host import show_text
from ..backends.svdquant import host_files as files
from ..backends.svdquant.calibrate import apply_calibrate
from ..backends.svdquant.config import BACKENDS, DTYPES, PRECISIONS, ConvertConfig, SVDQuantConfig
from ..backends.svdquant.host import load_svdquant, notice_of


class SlipstreamSVDQuantLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamSVDQuantLoader",
            display_name="Slipstream SVDQuant Loader",
            category="model/loaders/slipstream",
            description=(
                "Approximate. Loads a 4-bit SVDQuant file (Nunchaku, Nunchaku Lite, comfy-kitchen) "
                "as an ordinary MODEL: LoRA, ControlNet and the other Slipstream nodes work as on "
                "any model. Files with ComfyUI's own names may be of any model that it knows."
            ),
            search_aliases=["nunchaku", "svdq", "int4", "fp4", "nvfp4", "4-bit", "load quantized"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.model_names(),
                    tooltip="A file in the diffusion_models folder. SVDQuant Inspect tells more.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip=(
                        "auto: measured on one layer when loading (GPU), else comfy-kitchen. "
                        "kitchen: comfy-kitchen's 4-bit kernels. nunchaku: its own kernels, if the "
                        "real package is installed. dequant: 16-bit matmuls, for GPUs without "
                        "4-bit units and closest to the 16-bit model. reference: slow, to compare."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Only a check: an error if the file is something else.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Only a check: an error if the file has another rank. 0: any.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the model computes in. auto: what ComfyUI chooses for this model and "
                        "device, which is fp32 where neither bf16 nor fp16 is safe."
                    ),
                ),
                io.Boolean.Input(
                    "keep_unpacked",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The first load writes an unpacked copy, about as large as the file, into "
                        "models/slipstream_cache; later ones take seconds and share its memory. "
                        "Off: nothing is written or read, and every load unpacks."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="The MODEL: wire it as from Load Diffusion Model.")],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        backend: str,
        precision: str = "auto",
        rank: int = 0,
        dtype: str = "auto",
        keep_unpacked: bool = True,
    ) -> io.NodeOutput:
        config = SVDQuantConfig(
            backend=backend,
            precision=precision,
            rank=rank,
            dtype=dtype,
            keep_unpacked=keep_unpacked,
        )
        model = load_svdquant(str(files.model_path(model_name)), config.to_json())
        if notice := notice_of(model):
            show_text(notice, cls.hidden.unique_id)
        return io.NodeOutput(model)


class SlipstreamSVDQuantInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamSVDQuantInspect",
            display_name="Slipstream SVDQuant Inspect",
            category="model/loaders/slipstream",
            description=(
                "Output-preserving. Only reads a file's header: dialect, family, precision, "
                "ranks, layers, sizes, and which backends can run it on this machine and why."
            ),
            search_aliases=["nunchaku info", "svdquant info", "model info"],
            is_experimental=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.model_names(),
                    tooltip="A file in the diffusion_models folder.",
                )
            ],
            outputs=[io.String.Output("text", tooltip="A few lines, for Preview as Text.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        text = files.inspect_model(model_name)
        show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(text)


class SlipstreamSVDQuantCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamSVDQuantCalibrate",
            display_name="Slipstream SVDQuant Calibrate",
            category="model/patch/slipstream",
            description=(
                "Output-preserving. Records the inputs of a 16-bit model's layers while it "
                "samples, for SVDQuant Convert. Every run under one name adds to what is known: "
                "a few prompts with the usual settings are enough."
            ),
            search_aliases=["nunchaku calibrate", "quantization statistics"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit MODEL. A clone is returned."),
                io.String.Input(
                    "name",
                    default="calibration",
                    tooltip="Give the same name to SVDQuant Convert.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Wire it to the sampler; it samples as before.")],
        )

    @classmethod
    def execute(cls, model: Any, name: str) -> io.NodeOutput:
        return io.NodeOutput(apply_calibrate(model, files.statistics_path(name)))


class SlipstreamSVDQuantConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamSVDQuantConvert",
            display_name="Slipstream SVDQuant Convert",
            category="model/loaders/slipstream",
            description=(
                "Approximate. Quantises a 16-bit FLUX.1, Qwen-Image, Z-Image or SDXL file to a "
                "4-bit SVDQuant file beside it, which SVDQuant Loader and Nunchaku read. One layer "
                "is in memory at a time. A calibration halves the error of layers with outliers."
            ),
            search_aliases=["nunchaku convert", "quantize model", "svdquant quantize"],
            is_experimental=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.model_names(),
                    tooltip="A 16-bit file in ComfyUI's names, as Load Diffusion Model reads it.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS[1:]),
                    default="int4",
                    tooltip="int4 runs on every GPU from RTX 30 on; nvfp4 is for RTX 50 and B200.",
                ),
                io.String.Input(
                    "statistics",
                    default="",
                    tooltip="The name given to SVDQuant Calibrate; empty: no calibration.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=16,
                    max=512,
                    step=16,
                    optional=True,
                    advanced=True,
                    tooltip="Of the 16-bit branch: 128 is a little better and larger than 32.",
                ),
                io.Boolean.Input(
                    "search",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Try several scales per group: some percent less error, slower.",
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Of the new file, beside the source; empty: made from its settings.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Replace a file of that name, once the new one is complete.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip=(
                        "Not read: whatever is connected runs first. Connect the latent of the "
                        "calibration run to do both in one graph."
                    ),
                ),
            ],
            outputs=[io.String.Output("file", tooltip="The name of the new file.")],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        precision: str,
        statistics: str,
        rank: int = 32,
        search: bool = False,
        file_name: str = "",
        overwrite: bool = False,
        after: Any = None,
    ) -> io.NodeOutput:
        config = ConvertConfig(precision=precision, rank=rank, search=search)
        file = files.convert_model(
            model_name,
            config,
            statistics=statistics.strip(),
            file_name=file_name,
            overwrite=overwrite,
        )
        show_text(file, cls.hidden.unique_id)
        return io.NodeOutput(file)
