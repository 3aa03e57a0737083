"""A narrow autoencoder that is written, exactly, into ComfyUI's TAESD (64 wide, ten blocks a half).

Exact because a TAESD block of zero weights is relu(x), channels filled with zeros stay zero, and
our tensors go to the leading channels. ComfyUI's vae_scale and vae_shift cancel the Flux latent
format's own, so TAESD's raw latent is the space of the diffusion model: it is whitened to N(0, 1)
per channel. Of the 16 latent channels the first ACTIVE carry the picture, the others are zero.
"""

import torch
from torch import Tensor, nn

WIDTH, LATENT, ACTIVE = 32, 16, 8
# Sequential index here -> index in TAESD's Sequential, for the modules that have weights.
_ENCODER_PLACES = {0: 0, 2: 2, 3: 3, 4: 6, 5: 7, 6: 10, 7: 11, 8: 14}
_DECODER_PLACES = {0: 1, 2: 3, 3: 4, 5: 7, 6: 8, 8: 12, 9: 13, 11: 17, 13: 19}
_FLUX_SCALE, _FLUX_SHIFT = 0.3611, 0.1159  # of ComfyUI's Flux latent format


def _conv(num_in: int, num_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, padding=1, stride=stride, bias=bias)


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def _encoder(width: int) -> nn.Sequential:
    def halve() -> nn.Conv2d:
        return _conv(width, width, stride=2, bias=False)

    down = [layer for _ in range(3) for layer in (halve(), Block(width))]
    return nn.Sequential(_conv(3, width), nn.ReLU(), *down, _conv(width, ACTIVE))


def _decoder(width: int) -> nn.Sequential:
    def double() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]

    return nn.Sequential(
        *(_conv(ACTIVE, width), nn.ReLU(), Block(width), Block(width)),
        *(*double(), Block(width), *double(), Block(width), *double(), nn.ReLU()),
        _conv(width, 3),
    )


class Autoencoder(nn.Module):
    """Pictures [N, 3, H, W] in 0 to 1 <-> latents [N, ACTIVE, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(WIDTH), _decoder(WIDTH)
        self.norm = nn.BatchNorm2d(ACTIVE, affine=False, momentum=0.02)

    def encode(self, pictures: Tensor) -> Tensor:
        """Whitened latents."""
        return self.norm(self.encoder(pictures).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, not clamped. TAESD's decoder limits its input to +-3, so training does too."""
        return self.decoder(torch.tanh(latents / 3) * 3)


def taesd_weights(trained: Autoencoder) -> dict[str, Tensor]:
    """The state dict of ComfyUI's TAESD that computes what `trained` does in evaluation.

    Whitening is folded into the encoder's last convolution.
    """
    from comfy.taesd.taesd import TAESD

    whole = TAESD(latent_channels=LATENT)
    encoder = {key: value.clone() for key, value in trained.encoder.state_dict().items()}
    mean, variance = trained.norm.running_mean, trained.norm.running_var
    assert mean is not None
    assert variance is not None
    deviation = (variance + trained.norm.eps).sqrt()
    encoder["8.weight"] /= deviation[:, None, None, None]
    encoder["8.bias"] = (encoder["8.bias"] - mean) / deviation
    halves = (
        ("taesd_encoder", encoder, whole.taesd_encoder, _ENCODER_PLACES),
        ("taesd_decoder", trained.decoder.state_dict(), whole.taesd_decoder, _DECODER_PLACES),
    )
    weights = {
        f"{prefix}.{key}": value
        for prefix, narrow, wide, places in halves
        for key, value in _embedded(narrow, wide, places).items()
    }
    scale = {"vae_scale": torch.tensor(_FLUX_SCALE), "vae_shift": torch.tensor(_FLUX_SHIFT)}
    return weights | scale


def _embedded(
    narrow: dict[str, Tensor], wide: nn.Module, places: dict[int, int]
) -> dict[str, Tensor]:
    """`wide`'s state dict as zeros, with each tensor of `narrow` in its leading corner."""
    weights = {key: torch.zeros_like(value) for key, value in wide.state_dict().items()}
    for key, value in narrow.items():
        index, rest = key.split(".", 1)
        target = weights[f"{places[int(index)]}.{rest}"]
        target[tuple(slice(0, size) for size in value.shape)] = value
    return weights
