"""Every family and strategy: a reused evaluation at the input it was stored at changes nothing.

Each step evaluates the model twice at the same point and a decider reuses the second time. That
holds for every calling convention, join and stream only if the residual is stored and added right.
"""

import pytest
import tiny
import torch
from cache_runs import cached, every_second, flat, is_clean, network, sample_twice_each, section
from slipstream.backends import architectures, compiler
from slipstream.backends.cache import blocks, strategy

FAMILIES = (*tiny.FAMILIES, *tiny.IN_MEMORY)
TOLERANCE = 2e-5

pytestmark = pytest.mark.usefixtures("comfy")


def load(family):
    return tiny.load(family, heads=3 if family in ("sd3", "sd35") else 1)


def has_stack(family):
    net = network(load(family))
    architecture = architectures.find(net)
    if architecture is None or architecture.notes.unet:
        return False
    stacks = [architectures.stack_blocks(net, stack) for stack in architecture.stacks]
    return sum(map(len, stacks)) > 1


def gaps(pairs):
    """Largest relative difference within the pairs."""
    return [((a - b).abs().max() / a.abs().max()).item() for a, b in pairs]


def check(family, **settings):
    model = load(family)
    patched = cached(model, decider=every_second, **settings)
    pairs = sample_twice_each(patched, family)
    found = section(patched)
    assert max(gaps(pairs)) < TOLERANCE
    assert found["hits"] == 6
    assert found["blocks_skipped"] > 0
    assert is_clean(model)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family(family):
    if not has_stack(family):
        pytest.skip(f"{family}: no block stack")
    found = check(family, strategy="fbcache")
    assert found["engine"] == "builtin"


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sd3", "ltxav", "hidream"])
def test_blocks_with_cache_dit(family):
    pytest.importorskip("cache_dit")
    found = check(family, strategy="cache-dit", engine="cache-dit", calibrator="taylorseer")
    assert found["engine"].startswith("cache-dit ")


@pytest.mark.parametrize(
    ("family", "name"),
    [("flux", "output"), ("sd15", "output"), ("ernie", "output"), ("wan", "fastercache-cfg"),
     ("sd3", "fastercache-cfg")],
)  # fmt: skip
def test_whole_outputs_and_branches(family, name):
    check(family, strategy=name, cfg_mode="separate")


@pytest.mark.parametrize(("family", "cache_ratio"), [("sd15", 0.25), ("sdxl", 0.5)])
def test_deep_levels_of_unets(family, cache_ratio):
    found = check(family, strategy="deepcache", cache_ratio=cache_ratio)
    assert found["unit"] == "U-Net levels"


@pytest.mark.parametrize("family", ["flux", "hunyuan_video", "wan"])
def test_teacache_probe(family):
    check(family, strategy="teacache")


def test_a_wrong_residual_would_be_noticed(monkeypatch):
    """Negative control of this file's check."""
    predict = strategy.Decisions.predict
    monkeypatch.setattr(
        strategy.Decisions,
        "predict",
        lambda self, call: tuple(1.001 * r for r in predict(self, call)),
    )
    with pytest.raises(AssertionError):
        check("flux", strategy="fbcache")


@pytest.mark.parametrize("family", ["hidream_o1", "qwen_image21"])
def test_a_part_of_the_sequence_cannot_be_cached(family, monkeypatch):
    """Negative control: these keep keys of the prompt, and leave it out of later calls."""
    monkeypatch.setattr(blocks, "whole_sequence", lambda architecture, options: options)
    monkeypatch.setattr(compiler, "prefix_cache_off", lambda network, options: False)
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError)):
        check(family, strategy="fbcache")


@pytest.mark.parametrize("family", ["sd15", "wan_animate2", "wan_causal", "lumina2", "ltxav"])
def test_auto_runs_where_there_is_no_stack_and_where_there_is(family):
    model = load(family)
    patched = cached(model, "auto", front_blocks=2)
    out = flat(tiny.sample(patched, family, steps=8))
    assert torch.isfinite(out).all()
    found = section(patched)
    expected = {"sd15": "deepcache", "wan_animate2": "output"}.get(family, "cache-dit")
    assert found["strategy"] == expected
    assert found["evaluations"] == 8
    assert is_clean(model)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sd15"])
def test_the_whole_run_is_the_plain_one_when_reuse_is_exact(family):
    model = load(family)
    plain = sample_twice_each(model, family)
    patched = cached(model, "auto", decider=every_second)
    pairs = sample_twice_each(patched, family)
    assert max(gaps([(p[0], q[0]) for p, q in zip(plain, pairs, strict=True)])) < 10 * TOLERANCE
    again = sample_twice_each(model, family)
    assert all(map(torch.equal, plain[-1], again[-1])), "the un-noded model has changed"
