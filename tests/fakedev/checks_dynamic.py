"""Checks of the watermark: what dynamic memory management holds, at most, under a budget."""

import comfy.model_management as management
import fake_vbar
import pytest
from fake_models import load, sample
from offload_probe import in_mode, offloaded
from slipstream.backends.memory import host as memory
from slipstream.backends.offload import host
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.run import run_log


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
    monkeypatch.setattr(management, "NUM_STREAMS", 0)
    config = OffloadConfig(mode="manual", vram_budget_gb=1.0, prefetch=1)
    with pytest.raises(ValueError, match="--disable-async-offload"):
        apply_offload(load("wan"), config)


@pytest.mark.parametrize("mode", ["auto", "speed"])
@pytest.mark.parametrize("reserve_mib", [400, 700])  # ComfyUI's, on Linux and on Windows
def test_what_dynamic_memory_keeps_is_never_given_up(env, monkeypatch, mode, reserve_mib):
    """aimdo fills a device up to 256 MiB, less than ComfyUI reserves: no reason to hold less."""
    monkeypatch.setattr(host, "copy_rates", lambda device: (50e9, 50e9))
    model = load("wan")
    full = sample(model, "wan", steps=6, cfg=1.0)
    env.end_node()
    kept = memory.resident_bytes(model)
    mib = memory.weight_bytes(model) / (12 << 10)  # the model stands for one of 12 GiB
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: reserve_mib * mib)
    patched = in_mode(model, mode)

    def fill(step, *_):
        if step == 0:
            env.device.total_bytes = env.device.held() + int(256 * mib)

    for _ in range(2):  # the second run begins with what the first one found
        assert sample(patched, "wan", steps=6, cfg=1.0, callback=fill).equal(full)
        assert "too full" not in run_log(patched).latest().to_text()
        env.end_node()
        env.device.total_bytes = 10**12
    assert memory.resident_bytes(model) >= kept
    assert vbar_of(model).watermark == vbar_of(model).num_pages
