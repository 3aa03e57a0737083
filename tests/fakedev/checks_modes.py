"""Modes, plans, ways to sample and the report under a budget, with both memory managements."""

import comfy.model_management as management
import pytest
import torch
from fake_models import blocks, load, relative_error, sample, with_lora
from offload_probe import NOTHING, in_mode, leftovers, offloaded, report, resident_share
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.offload import budget, host

STEPS = 6  # enough to measure, plan and judge


@pytest.mark.parametrize("mode", ["auto", "speed", "memory", "off"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_every_mode_keeps_the_output(env, mode, share):
    model = load("wan")
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    patched = in_mode(model, mode, share)
    for _ in range(2):  # the second run begins with what the first one found
        assert sample(patched, "wan", steps=STEPS).equal(full)
        env.end_node()
    assert leftovers(model) == NOTHING
    if share and mode != "off":
        assert resident_share(patched) <= share


def test_memory_mode_plans_and_remembers(env, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (50e9, 50e9))
    patched = in_mode(load("wan"), "memory")
    shares = []
    for _ in range(2):
        sample(patched, "wan", steps=STEPS)
        run = report(patched)["offload"]
        shares.append(resident_share(patched))
        assert run["plan"]["why"] == "copies hide behind computing"
        assert run["predicted_step_seconds"] > 0
        assert run["measured_step_seconds"] > 0
        assert run["stall_seconds"] >= 0
        assert run["block_copies"] > 0
        env.end_node()
    assert max(shares) < 0.6  # copies are fast, so little needs to stay


def test_every_size_has_a_plan_of_its_own(env, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (50e9, 50e9))
    patched = in_mode(load("wan"), "memory")
    memo = patched.get_attachment(budget.KEY)
    for shape in ((1, 16, 2, 16, 16), (1, 16, 1, 16, 16), (1, 16, 2, 16, 16)):
        sample(patched, "wan", steps=4, shape=shape)
        env.end_node()
    shapes = sorted(shape for shape, _, _ in memo.decisions)
    assert shapes == [(1, 16, 1, 16, 16), (1, 16, 2, 16, 16)]
    assert {card for _, _, card in memo.decisions} == {"fakegpu:0 fakegpu"}


def test_speed_mode_prefetches_after_the_measured_step(env, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (5e9, 5e9))
    monkeypatch.setattr("slipstream.backends.offload.tuner.SLOWER", 100.0)
    model = load("wan")
    num_blocks = len(blocks(model))
    patched = in_mode(model, "speed", 0.6)
    sample(patched, "wan", steps=STEPS)
    first = report(patched)["offload"]
    env.end_node()
    sample(patched, "wan", steps=STEPS)
    second = report(patched)["offload"]
    # One more: classic stages the first block of a call that does not come any more.
    assert 0 < first["block_copies"] <= (STEPS - 2) * num_blocks + 1
    assert first["block_copies"] < second["block_copies"] <= STEPS * num_blocks + 1


def test_a_slower_plan_is_rolled_back(env, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (5e9, 5e9))
    monkeypatch.setattr("slipstream.backends.offload.tuner.SLOWER", -1.0)
    patched = in_mode(load("wan"), "speed", 0.6)
    for _ in range(2):
        sample(patched, "wan", steps=STEPS)
        env.end_node()
        run = report(patched)["offload"]
        assert run["rolled_back"]
        assert run["prefetch_blocks"] == 0
    assert run["block_copies"] == 0  # a rolled back setting is not tried again


@pytest.mark.parametrize("mode", ["auto", "speed"])
def test_all_resident_says_that_offload_gains_nothing(env, monkeypatch, mode):
    monkeypatch.setattr(host, "copy_rates", lambda device: pytest.fail("nothing has to be copied"))
    patched = in_mode(load("wan"), mode)
    sample(patched, "wan", steps=STEPS)
    found = report(patched)["offload"]
    assert "off is as fast" in found["plan"]["why"]
    assert found["pinned_bytes_per_second"] is None
    assert found["block_copies"] == 0


def test_copy_rates_are_measured_once_and_leave_nothing(env, monkeypatch):
    device = torch.device("fakegpu:0")
    unpinned = []
    monkeypatch.setattr(management, "pin_memory", lambda tensor: True)
    monkeypatch.setattr(management, "unpin_memory", unpinned.append)
    held = env.device.held()
    host.copy_rates.cache_clear()
    env.device.total_bytes = held + (32 << 20)  # the chunk takes a quarter of what is free
    env.device.reset_peak()
    rates = host.copy_rates(device)
    assert min(rates) > 0
    assert env.device.peak() - held == 8 << 20
    assert env.device.held() == held
    assert [tensor.nbytes for tensor in unpinned] == [8 << 20]
    copied = env.device.copied_in()
    assert host.copy_rates(device) == rates
    assert env.device.copied_in() == copied
    host.copy_rates.cache_clear()


@pytest.mark.parametrize("options", [{"split": True}, {"sampler": "heun"}, {"cfg": 1.0}])
def test_other_ways_to_sample(env, options):
    model = load("wan")
    full = sample(model, "wan", steps=4, **options)
    env.end_node()
    assert sample(in_mode(model, "memory"), "wan", steps=4, **options).equal(full)


def test_lora_in_memory_mode(env):
    model = with_lora(load("wan"))
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    assert relative_error(sample(in_mode(model, "memory"), "wan", steps=STEPS), full) < 1e-5


def test_memory_section(env):
    model = load("wan")
    patched = offloaded(model, 0.3)
    sample(patched, "wan")
    found = report(patched)["memory"]
    assert found["total_bytes"] == env.device.total_bytes
    assert found["peak_bytes"] >= max(found["stages"]["load"], found["stages"]["sampling"])
    one = next(m for m in found["models"] if m["kind"] == "diffusion model")
    assert (one["name"], one["manager"]) == ("WanModel", env.manager)
    assert one["resident_bytes"] + one["streamed_bytes"] == one["total_bytes"]
    assert one["streamed_bytes"] > 0
    (stays,) = found["could_stay_resident"]
    assert "vram_budget_gb" in stays["how"]
    assert stays["bytes"] == one["streamed_bytes"]
    env.end_node()
    decoded = torch.empty(50_000_000, dtype=torch.uint8, device="fakegpu")
    del decoded
    sample(patched, "wan", seed=2)
    assert report(patched)["memory"]["stages"]["decode"] >= 50_000_000


def test_report_of_a_run_without_the_node(env):
    """Any technique of ours brings the memory section."""
    model = apply_cache(load("flux"), CacheConfig.from_ratio(0.5))
    sample(model, "flux")
    found = report(model)
    assert "offload" not in found
    assert found["memory"]["models"][0]["name"] == "Flux"
