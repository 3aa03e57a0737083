"""The shipped demo model in ComfyUI: loads, repeats, draws its classes; quality has not dropped."""

import json

import pytest
import torch
from slipstream.bench import demo_models, draw, quality_baseline
from slipstream.bench.judge import psnr
from slipstream.bench.trained import CLOCKS, TrainedModel

BYTES = 12_000_000  # of all shipped weights


@pytest.fixture(scope="module")
def demo(comfy):
    """With one thread: on networks this small a second one waits more than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TrainedModel(clock=CLOCKS["cpu"])
    torch.set_num_threads(before)


def test_weights_are_small_enough():
    files = list(demo_models.WEIGHTS.glob("*.safetensors"))
    assert {demo_models.FLUX, demo_models.VAE, demo_models.CLASS_VECTORS} < {f.name for f in files}
    assert sum(path.stat().st_size for path in files) <= BYTES


def test_ordinary_loaders_know_the_model(demo):
    assert type(demo.model.model).__name__ == "Flux"
    assert type(demo.vae.first_stage_model).__name__ == "TAESD"


def test_a_seed_repeats_bit_for_bit(demo):
    first, again, other = (demo.sample([3], seed=s, num_steps=4).latents for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_step_has_a_time(demo):
    sampled = demo.sample([3], seed=1, num_steps=4)
    assert len(sampled.step_ms) == 4
    assert sum(sampled.step_ms) <= sampled.seconds * 1000 + 1


def test_the_vae_knows_the_drawn_pictures(demo):
    pictures, _ = draw.batch(20, torch.Generator().manual_seed(9))
    latents = demo.vae.encode(pictures.movedim(1, -1))
    assert psnr(demo.decode(latents), pictures).mean() > 30


def test_the_classifier_sees_what_was_asked_for(demo):
    """The claim of docs/benchmarks/demo-model.md is over more pictures; this holds the floor."""
    pictures, labels = demo.pictures(40, batch=20)
    right = demo.is_right(pictures, labels).float().mean()
    shifted = [(label + 1) % len(draw.CLASSES) for label in labels]
    wrong = demo.is_right(pictures, shifted).float().mean()
    assert right >= 0.85
    assert wrong < 0.15


def test_no_class_is_no_class(demo):
    """The vectors matter: with those of "none" the classifier is near chance."""
    none = [len(draw.CLASSES)] * 20
    sampled = demo.decode(demo.sample(none, seed=1).latents)
    assert demo.is_right(sampled, [0] * 20).float().mean() < 0.6


def test_quality_at_the_default_settings_has_not_dropped(demo):
    recorded = json.loads(quality_baseline.BASELINE_FILE.read_text("utf-8"))
    assert recorded["num_seeds"] == quality_baseline.NUM_SEEDS
    found = quality_baseline.measure(demo)
    assert found >= recorded["psnr_db"] - recorded["noise_db"]


def test_the_check_can_fail(demo):
    """A cache that reuses far more than the default is below what the check lets pass."""
    from slipstream.backends.cache.config import CacheConfig

    recorded = json.loads(quality_baseline.BASELINE_FILE.read_text("utf-8"))
    reckless = CacheConfig.from_ratio(1.0, strategy="output", warmup=1)
    found = quality_baseline.measure(demo, reckless)
    assert found < recorded["psnr_db"] - recorded["noise_db"]
