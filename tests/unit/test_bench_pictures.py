"""Drawings repeat, PSNR and SSIM on pairs with known answers, training goes on where it stopped."""

import pytest
import torch
from slipstream.bench import draw
from slipstream.bench.autoencoder import ACTIVE, Autoencoder
from slipstream.bench.judge import Classifier, psnr, ssim
from slipstream.bench.training import Schedule, Training


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_drawings_repeat_and_differ_by_seed():
    a, labels = draw.batch(20, seeded(1))
    b, again = draw.batch(20, seeded(1))
    c, _ = draw.batch(20, seeded(2))
    assert torch.equal(a, b)
    assert torch.equal(labels, again)
    assert not torch.equal(a, c)
    assert a.shape == (20, 3, draw.SIZE, draw.SIZE)
    assert a.min() >= 0
    assert a.max() <= 1


@pytest.mark.parametrize("label", range(len(draw.CLASSES)), ids=draw.CLASSES)
def test_every_class_has_a_shape_on_a_plain_ground(label):
    picture = draw.draw(torch.tensor([label]), seeded(3))[0]
    ground = picture[:, 0, 0]
    covered = ((picture - ground[:, None, None]).abs().amax(0) > 0.1).float().mean()
    assert 0.08 < covered < 0.6
    assert torch.equal(picture[:, 0, -1], ground)


def test_psnr_of_known_pairs():
    black = torch.zeros(1, 3, 64, 64)
    assert psnr(black, black).item() == pytest.approx(100)
    assert psnr(black + 0.1, black).item() == pytest.approx(20, abs=1e-4)
    assert psnr(black + 1, black).item() == pytest.approx(0, abs=1e-4)


def test_ssim_of_known_pairs():
    picture = torch.rand(2, 3, 64, 64, generator=seeded(4))
    noise = torch.rand(2, 3, 64, 64, generator=seeded(5))
    assert ssim(picture, picture).min().item() == pytest.approx(1, abs=1e-5)
    assert ssim(picture, noise).abs().max() < 0.1
    assert 0.5 < ssim(picture, (picture + 0.1 * noise).clamp(0, 1)).min() < 1
    # Two constants: only the luminance term is left, (2ab + C1) / (a^2 + b^2 + C1).
    a, b = torch.full((1, 3, 64, 64), 0.25), torch.full((1, 3, 64, 64), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-3)


def test_sizes_of_the_networks():
    net, pictures = Autoencoder().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        latents = net.encode(pictures)
        assert latents.shape == (2, ACTIVE, 8, 8)
        assert net.decode(latents).shape == pictures.shape
        assert Classifier()(pictures).shape == (2, 10)


def trained(path, num_steps, stop_after=None):
    """A line fitted to noise, as far as `stop_after`."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    schedule = Schedule(num_steps=num_steps, learning_rate=0.1, seed=1, ema=0.9, checkpoint_every=5)
    training = Training(net, schedule, path)

    def loss(generator):
        if stop_after is not None and training.step == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()

    training.run(loss, label="test")
    return net, training


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path):
    whole, _ = trained(tmp_path / "whole.checkpoint", 20)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.checkpoint", 20, stop_after=13)  # the checkpoint is of step 10
    parts, training = trained(tmp_path / "parts.checkpoint", 20)
    assert training.lengths == [(0, 20)]
    assert torch.equal(whole.weight, parts.weight)
    assert torch.equal(whole.bias, parts.bias)


def test_another_length_is_recorded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a.checkpoint", 20, stop_after=7)
    _, training = trained(tmp_path / "a.checkpoint", 10)
    assert training.lengths == [(0, 20), (5, 10)]
    assert training.step == 10
