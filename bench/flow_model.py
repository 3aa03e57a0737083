"""ComfyUI's own Flux class at demo size, made trainable, with a learned vector for every class.

The file that comes of it has no text encoder beside it: `context` [11, 4, 64] and `pooled` [11, 64]
are trained with the flow and stored in their own file; the last row means "no class". With
guidance_in ComfyUI takes it for FLUX.1-dev and shifts the sigmas up, where small pictures compose.
Two facts of ComfyUI 0.33 are worked around here and nowhere else: `in_training` selects a rotary
embedding that has a backward, and Flux's blocks add in place to what LayerNorm saved for its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .draw import CLASSES

NO_CLASS = len(CLASSES)
NUM_CONTEXT_TOKENS, CONTEXT_DIM, POOLED_DIM = 4, 64, 64
GUIDANCE = 3.5  # ComfyUI's default where no FluxGuidance node says otherwise
SIGMA_SHIFT = 3.16  # exp(1.15): ComfyUI's default for a Flux with guidance_in
SHAPE = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": POOLED_DIM,
    "context_in_dim": CONTEXT_DIM,
    "hidden_size": 128,  # detection takes the heads as hidden_size / 128
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 8,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


class ClassFlow(nn.Module):
    """Velocity of the flow from pictures (sigma 0) to noise (sigma 1), for labels 0 to NO_CLASS."""

    def __init__(self, *, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.flux = _trainable_flux(generator)
        self.context = nn.Parameter(
            torch.randn(NO_CLASS + 1, NUM_CONTEXT_TOKENS, CONTEXT_DIM, generator=generator)
        )
        self.pooled = nn.Parameter(torch.randn(NO_CLASS + 1, POOLED_DIM, generator=generator))

    def forward(self, latents: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
        """[N, 16, H, W], [N], [N] -> [N, 16, H, W], noise minus latent."""
        guidance = torch.full_like(sigmas, GUIDANCE)
        return self.flux(
            latents, sigmas, self.context[labels], self.pooled[labels], guidance=guidance
        )


def _trainable_flux(generator: torch.Generator) -> Any:
    import comfy.model_management
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    comfy.model_management.in_training = True
    flux = Flux(
        **SHAPE, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    with torch.no_grad():  # ComfyUI's layers leave their weights unset
        for name, value in flux.named_parameters():
            if value.ndim < 2:
                value.fill_(1.0 if "norm" in name else 0.0)
            elif "mod" in name or name.startswith("final_layer"):
                value.zero_()
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * value.shape[1] ** -0.5)
    for module in flux.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    return flux
