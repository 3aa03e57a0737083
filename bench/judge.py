"""The judge of pictures: a small classifier, PSNR and SSIM.

The classifier is trained by train_demo.py on drawn and on decoded pictures; accuracy is that of its
first choice. PSNR and SSIM compare two pictures of the same seed, SSIM on the luma with the usual
11-tap Gaussian window of sigma 1.5 (Wang et al. 2004), without padding.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

_WIDTHS = (3, 16, 32, 64, 64)
_MOST_PSNR = 100.0  # dB, given to identical pictures
_LUMA = (0.299, 0.587, 0.114)


class Classifier(nn.Sequential):
    """[N, 3, 64, 64] in 0 to 1 -> scores [N, num_classes]."""

    def __init__(self, num_classes: int = 10):
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(_WIDTHS):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(_WIDTHS[-1] * 16, num_classes))


def load_classifier(path: Path) -> Classifier:
    """The trained classifier, in evaluation."""
    from safetensors.torch import load_file

    classifier = Classifier()
    weights = load_file(path)
    classifier.load_state_dict(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in weights.items()
        }
    )
    return classifier.eval()


def is_right(classifier: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """[N] of bool: the classifier's first choice is the label."""
    with torch.no_grad():
        return classifier(pictures.float()).argmax(1) == labels


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """dB, [N], of pictures [N, 3, H, W] in 0 to 1; 100 where they are identical."""
    error = ((pictures - reference) ** 2).flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=_MOST_PSNR)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of the lumas, [N], 1 where they are identical."""
    weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
    a, b = ((image * weights).sum(1, keepdim=True) for image in (pictures, reference))
    axis = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    axis = axis / axis.sum()
    window = (axis[:, None] * axis[None, :])[None, None]
    mean_a, mean_b = conv2d(a, window), conv2d(b, window)
    var_a = conv2d(a * a, window) - mean_a**2
    var_b = conv2d(b * b, window) - mean_b**2
    covariance = conv2d(a * b, window) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (above / below).flatten(1).mean(1)
