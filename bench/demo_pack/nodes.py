"""SlipstreamDemoClass: a class of the trained demo model to CONDITIONING, without a text encoder.

The vectors are those that training learned, one row for each class and a last one for "none"; they
lie in the models folder, in embeddings/slipstream_demo_classes.safetensors.
"""

import folder_paths
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file

FILE = "slipstream_demo_classes.safetensors"
CLASSES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "two",
    "four",
    "seven",
    "none",
)


class SlipstreamDemoClass(io.ComfyNode):
    """What a CLIPTextEncode is to other models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamDemoClass",
            display_name="Demo Class",
            category="slipstream/demo",
            is_dev_only=True,
            inputs=[io.Combo.Input("class_name", options=list(CLASSES), default="heart")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, class_name: str) -> io.NodeOutput:
        vectors = load_file(folder_paths.get_full_path_or_raise("embeddings", FILE))
        row = CLASSES.index(class_name)
        pooled = vectors["pooled"][row : row + 1]
        return io.NodeOutput([[vectors["context"][row : row + 1], {"pooled_output": pooled}]])


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SlipstreamDemoClass]
