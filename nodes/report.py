"""SlipstreamReport: what happened while a latent was sampled, as text, JSON and a picture."""

from typing import Any

from comfy_api.latest import io, ui

from ..backends import host, picture
from ..backends.report import report_on
from ..backends.run import run_log


class SlipstreamReport(io.ComfyNode):
    """The latent passes through; the run that made it is looked up in the MODEL's own log."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamReport",
            display_name="Slipstream Report",
            category="model/patch/slipstream",
            description=(
                "Output-preserving. The latent passes through unchanged. Shows what the "
                "Slipstream nodes did while it was sampled: which kernel each layer used in each "
                "step, what was reused, what fell back and why, how long it took."
            ),
            search_aliases=["benchmark", "profile", "statistics", "attention report", "speed"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "The LATENT that the sampler made. The run is found by its values, so a "
                        "cached latent shows the run that made it, not the latest one. Connect "
                        "it straight behind the sampler: upscaled or edited, it matches no run."
                    ),
                ),
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The MODEL that the sampler used, behind the Slipstream nodes. It keeps "
                        "a record of its latest 32 runs, without tensors."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="The input, unchanged."),
                io.Image.Output("image", tooltip="The report as a picture, 1600 pixels wide."),
                io.String.Output("text", tooltip="The report in a few lines."),
                io.String.Output("json", tooltip="The report as JSON, schema 1."),
            ],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], model: Any) -> io.NodeOutput:
        report = report_on(run_log(model), latent["samples"])
        image = picture.to_tensor(picture.draw(report))
        host.show_text(report.text, cls.hidden.unique_id)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | ui.PreviewText(report.text).as_dict()
        return io.NodeOutput(latent, image, report.text, report.json_text, ui=shown)
