"""SlipstreamAttention: widgets to AttentionConfig."""

from typing import Any

from comfy_api.latest import io

from ..backends.attention.apply import apply_attention
from ..backends.attention.config import BACKENDS, POLICIES, AttentionConfig


class SlipstreamAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamAttention",
            display_name="Slipstream Attention",
            category="model/patch/slipstream",
            description=(
                "Approximate. Picks the fastest attention kernel per layer and step that passes an "
                "accuracy check on the model's own tensors. Policy 'exact': same mathematics, "
                "other rounding, like another GPU. Without a CUDA or ROCm GPU nothing changes, bit "
                "for bit."
            ),
            search_aliases=[
                "sage attention", "sageattention", "flash attention", "xformers", "sdpa",
                "int8 attention", "patch attention", "spargeattn", "cudnn attention", "sol-attn",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to speed up. A clone is returned."),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default="balanced",
                    tooltip=(
                        "exact: same mathematics, other rounding: like another GPU, not the same "
                        "pixels. balanced: also 8-bit kernels that pass the accuracy check. "
                        "fastest: also sparse and 4-bit kernels. manual: only the kernel chosen in "
                        "backend."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip=(
                        "The one kernel of policy manual; other policies choose by themselves and "
                        "the report says that this was not used."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip=(
                        "On: a call that no kernel of the policy can take stops the run with the "
                        "reason. Off: that call uses ComfyUI's own attention, and is counted."
                    ),
                ),
                io.Int.Input(
                    "dense_first_steps", default=-1, min=-1, max=10000, optional=True,
                    advanced=True,
                    tooltip=(
                        "Only exact kernels on this many first steps of the whole schedule: they "
                        "set the layout. -1: one, and none in schedules of fewer than 10 steps. A "
                        "schedule that two samplers share (Wan 2.2) counts once."
                    ),
                ),
                io.Int.Input(
                    "dense_last_steps", default=-1, min=-1, max=10000, optional=True,
                    advanced=True,
                    tooltip=(
                        "Only exact kernels on this many last steps of the whole schedule: they "
                        "set fine detail. -1: one, and none in schedules of fewer than 10 steps."
                    ),
                ),
                io.String.Input(
                    "dense_blocks", default="", optional=True, advanced=True,
                    tooltip=(
                        "Blocks that use exact kernels only, such as '0, 1, 47-49', counted over "
                        "the whole model in the order they run (Flux: double 0-18, single 19-56)."
                    ),
                ),
                io.Int.Input(
                    "min_tokens", default=1024, min=0, max=1 << 24, optional=True, advanced=True,
                    tooltip="Calls shorter than this many tokens stay exact: little to gain there.",
                ),
                io.Boolean.Input(
                    "probe", default=True, optional=True, advanced=True,
                    tooltip=(
                        "Check each approximate kernel against fp32 on 256 rows of every layer. A "
                        "layer that fails stays exact. Results are kept per model file; later runs "
                        "check one layer."
                    ),
                ),
                io.Boolean.Input(
                    "autotune", default=True, optional=True, advanced=True,
                    tooltip=(
                        "Time the candidates on the real shapes (once per GPU, kept on disk) and "
                        "use one only if it gains: 3 % for an exact kernel, 10 % for an "
                        "approximate one. Off: the policy's order decides."
                    ),
                ),
                io.Float.Input(
                    "max_rel_l1", default=0.05, min=0.0, max=10.0, step=0.005, optional=True,
                    advanced=True,
                    tooltip="The check fails above this relative error (0.05 = 5 % of the mean).",
                ),
                io.Float.Input(
                    "min_cos", default=0.995, min=-1.0, max=1.0, step=0.001, optional=True,
                    advanced=True,
                    tooltip="The check fails below this cosine similarity (1 = same direction).",
                ),
                io.String.Input(
                    "freeze", default="", optional=True, advanced=True,
                    tooltip=(
                        "A name: the first run writes its choice of kernels under it, later runs "
                        "repeat that choice exactly, so that one seed gives one picture on this "
                        "machine. Or paste `plan` of a report's JSON. Empty: every run chooses."
                    ),
                ),
                io.Boolean.Input(
                    "retune", default=False, optional=True, advanced=True,
                    tooltip=(
                        "On: every run measures and checks as if for the first time, and writes a "
                        "frozen plan anew. Turn it off again afterwards."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched MODEL: wire it to any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        policy: str,
        backend: str,
        strict: bool,
        dense_first_steps: int = -1,
        dense_last_steps: int = -1,
        dense_blocks: str = "",
        min_tokens: int = 1024,
        probe: bool = True,
        autotune: bool = True,
        max_rel_l1: float = 0.05,
        min_cos: float = 0.995,
        freeze: str = "",
        retune: bool = False,
    ) -> io.NodeOutput:
        config = AttentionConfig(
            policy=policy, backend=backend, strict=strict, dense_first_steps=dense_first_steps,
            dense_last_steps=dense_last_steps, dense_blocks=dense_blocks, min_tokens=min_tokens,
            probe=probe, autotune=autotune, max_rel_l1=max_rel_l1, min_cos=min_cos,
            freeze=freeze, retune=retune,
        )  # fmt: skip
        return io.NodeOutput(apply_attention(model, config))
