"""Chroma: FLUX.1's blocks without modulation layers, which one small network replaces.

Read only; no file of Nunchaku's own, two exporters of the community. Source: nunchaku-chroma
(transformer_chroma.py: names, unsigned feed-forward as in FLUX.1), diffusers' ChromaApproximator.
The other exporter keeps norm_q under `attn`; whether the inputs of its int4 feed-forward are
shifted, its own code does not agree on (nunchux-ai/nunchaku#916, #928).
"""

from dataclasses import replace

from .data import Block, Family
from .flux import DOUBLE, FLUX, SINGLE

GUIDANCE = "distilled_guidance_layer"
MAX_LAYERS = 16  # of the guidance network; Chroma has 5


def _without_modulation(block: Block) -> Block:
    return replace(block, layers=tuple(one for one in block.layers if not one.chunks))


CHROMA = Family(
    id="chroma",
    title="Chroma",
    model_class="NunchakuChromaTransformer2DModel",
    dialect="nunchaku-1",
    markers=(("transformer_blocks.0.ff_context.net.2", f"{GUIDANCE}.in_proj"),),
    native=(),
    blocks=(_without_modulation(DOUBLE), _without_modulation(SINGLE)),
    rest=(
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
        *(
            (f"{GUIDANCE}.layers.{i}.linear_{n}", f"{GUIDANCE}.layers.{i}.{end}_layer")
            for i in range(MAX_LAYERS)
            for n, end in ((1, "in"), (2, "out"))
        ),
        (GUIDANCE, GUIDANCE),
    ),
    aliases=FLUX.aliases,
    doubtful="transformer_blocks.0.attn.norm_q.weight",
)
