"""Checks of the watermark: what dynamic memory management holds, at most, under a budget."""

import fake_vbar
import pytest
from fake_models import load, sample
from offload_probe import offloaded
from slipstream.backends.memory import host as memory
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import OffloadConfig


def vbar_of(model):
    return next(iter(model.model.dynamic_vbars.values()))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("prefetch", [-1, 0])
def test_watermark_is_never_exceeded(env, share, prefetch):
    model = load("wan")
    sample(offloaded(model, share, prefetch), "wan")
    vbar = vbar_of(model)
    forced = memory.forced_bytes(model)
    cap = share * memory.placed_bytes(model)
    if share < 1:
        assert vbar.peak_bytes <= max(cap - forced, 0) + fake_vbar.PAGE
    else:
        assert vbar.peak_bytes >= cap - forced
    env.end_node()
    sample(model, "wan")
    assert vbar.watermark == vbar.num_pages


def test_depth_beyond_the_streams_is_refused(env):
    model = load("wan")
    config = OffloadConfig(mode="manual", vram_budget_gb=1.0, prefetch=3)
    with pytest.raises(ValueError, match=r"prefetch 3 needs .*--async-offload 4 \(it has 2"):
        apply_offload(model, config)


def test_no_streams_no_prefetch(env, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "NUM_STREAMS", 0)
    config = OffloadConfig(mode="manual", vram_budget_gb=1.0, prefetch=1)
    with pytest.raises(ValueError, match="--disable-async-offload"):
        apply_offload(load("wan"), config)
