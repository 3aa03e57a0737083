"""Checks of the block streamer's own bookkeeping: bytes staged, bytes copied, blocks chosen."""

import pytest
from fake_models import blocks, load, sample, with_lora
from offload_probe import NOTHING, in_mode, leftovers, offloaded, report, resident_share
from slipstream.backends.memory import host as memory
from slipstream.backends.offload import host
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.blocks import module_sizes
from slipstream.backends.offload.config import GIB, OffloadConfig
from slipstream.backends.offload.trial import Trial
from slipstream.backends.run import run_log


@pytest.mark.parametrize("depth", [1, 2])
def test_staged_peak_is_depth_plus_one_blocks(env, depth):
    model = load("wan")
    largest = max(sum(module_sizes(block)) for block in blocks(model))
    budgeted = offloaded(model, 0.0, depth)
    held = env.device.held()
    env.device.reset_peak()
    sample(budgeted, "wan", steps=1, cfg=1.0)
    buffers = report(budgeted)["offload"]["buffer_bytes"]
    aligned = len(list(blocks(model)[0].parameters())) * 1024
    assert (depth + 1) * largest <= buffers <= (depth + 1) * (largest + aligned)
    assert env.device.peak() - held < buffers + memory.weight_bytes(model) // 2


def copied(env, patched, **options):
    """Bytes copied to the device by a second run, when nothing is loaded any more."""
    sample(patched, "wan", **options)
    env.device.reset_copied_in()
    sample(patched, "wan", seed=2, **options)
    return env.device.copied_in()


def test_every_block_is_copied_once_per_call(env, monkeypatch):
    """Prefetch moves copies ahead; it adds none but that of a next call that does not come."""
    monkeypatch.setattr(host, "copy_rates", lambda device: (1e9, 1e9))
    model = load("wan")
    options = {"steps": 4, "cfg": 1.0}
    resident = copied(env, model, **options)  # operators that fall back to the CPU copy too
    by_core, by_us = (copied(env, offloaded(model, 0.0, p), **options) for p in (-1, 0))
    sizes = [sum(module_sizes(block)) for block in blocks(model)]
    assert by_us - by_core == pytest.approx(sizes[0], rel=0.01)
    outside = memory.weight_bytes(model) - sum(sizes)
    assert 4 * sum(sizes) <= by_core - resident <= 4 * (sum(sizes) + outside)


def test_lora_matrices_are_staged_too(env):
    model = load("wan")
    rank = 4
    sample(offloaded(model, 0.0), "wan", steps=1)
    buffers = []
    for patcher in (model, with_lora(model, rank=rank)):
        budgeted = offloaded(patcher, 0.0)
        sample(budgeted, "wan", steps=1)
        buffers.append(report(budgeted)["offload"]["buffer_bytes"])
    matrices = [w for w in blocks(model)[0].parameters() if w.ndim == 2]
    lora = sum(4 * rank * sum(w.shape) for w in matrices)
    assert 2 * lora <= buffers[1] - buffers[0] <= 2 * (lora + 2048 * len(matrices))


def test_chosen_blocks_are_the_resident_ones(env, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (1e8, 1e8))  # copies stall
    model = load("flux")
    share = 0.9
    config = OffloadConfig(mode="memory", vram_budget_gb=share * memory.weight_bytes(model) / GIB)
    patched = apply_offload(model, config)
    sample(patched, "flux", steps=6)
    chosen = report(patched)["offload"]["plan"]["resident_blocks"]
    resident = [
        all(p.device.type != "cpu" for p in block.parameters()) for block in blocks(patched)
    ]
    assert 0 < len(chosen) < len(resident)
    # ComfyUI keeps a reserve of its own, so the last chosen block may stay out.
    assert sum(resident[index] for index in chosen) >= len(chosen) - 1
    assert any(resident)


def test_budget_below_the_floor_is_refused(env):
    model = load("wan")
    with pytest.raises(ValueError, match=r"vram_budget_gb 0\.001 is too small: small weights and"):
        apply_offload(model, OffloadConfig(mode="manual", vram_budget_gb=0.001))
    apply_offload(model, OffloadConfig(mode="manual", vram_budget_gb=0.001, prefetch=-1))


@pytest.mark.parametrize("gain", [0.5, 0.0])
def test_auto_gives_way_when_the_device_fills(env, monkeypatch, gain):
    """Another program takes the memory that activations need, then gives it back. What is gained
    is the end of a spill that this device cannot have, so it is set."""
    monkeypatch.setattr(host, "copy_rates", lambda device: (50e9, 50e9))
    model = load("wan")
    full = sample(model, "wan", steps=6, cfg=1.0)  # a full device splits cond and uncond
    env.end_node()
    patched = in_mode(model, "auto")
    real = Trial.step_ended

    def step_ended(self, measured):
        return None if real(self, measured) is None else gain

    monkeypatch.setattr(Trial, "step_ended", step_ended)

    def fill(step, *_):
        if step == 0:
            env.device.total_bytes = env.device.held()

    assert sample(patched, "wan", steps=6, cfg=1.0, callback=fill).equal(full)
    assert (resident_share(patched) < 0.95) == (gain > 0)
    text = run_log(patched).latest().to_text()
    outcome = "kept" if gain else "undone"
    assert f"fewer weights, the device is too full: tried and {outcome}" in text
    assert report(patched)["offload"]["rolled_back"] == (gain == 0)
    env.end_node()
    env.device.total_bytes = 10**12
    for _ in range(2):
        assert sample(patched, "wan", steps=6, cfg=1.0).equal(full)
        env.end_node()
    assert resident_share(patched) > 0.95
    assert leftovers(model) == NOTHING
