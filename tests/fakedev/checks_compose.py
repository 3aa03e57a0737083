"""Other techniques, models, patchers and ComfyUIs under a budget, with both memory managements."""

import functools
import logging
from dataclasses import replace

import comfy.model_management as management
import fake_vbar
import pytest
import svdquant_models
from fake_models import blocks, load, sample
from offload_probe import NOTHING, in_mode, leftovers, offloaded, report, resident_share
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.memory import host as memory
from slipstream.backends.offload import budget, host
from slipstream.backends.offload.config import GIB, OffloadConfig, OffloadError
from slipstream.backends.svdquant import host_cache
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.parallel.runs import RunFacts, config_fields
from slipstream.parallel.worker import LoadedModel

STEPS = 6  # enough to measure, plan and judge


def test_compiled_model_gets_the_cap_alone(env):
    """ComfyUI's torch.compile nodes wrap APPLY_MODEL under this key."""
    model = load("wan")
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    patched = in_mode(model, "speed", 0.5)
    patched.add_wrapper_with_key(
        "apply_model", "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    assert sample(patched, "wan", steps=STEPS).equal(full)
    found = report(patched)["offload"]
    assert "compiled" in found["no_prefetch"]
    assert found["block_copies"] == 0
    assert resident_share(patched) <= 0.5


@pytest.mark.parametrize("cache_first", [False, True])
def test_cache_with_offload(env, monkeypatch, cache_first):
    cache = CacheConfig(
        strategy="fbcache", engine="builtin", warmup=2, front_blocks=1,
        residual_diff_threshold=0.9, max_continuous_cached_steps=2,
    )  # fmt: skip
    model = load("flux")
    wanted = sample(apply_cache(model, cache), "flux", steps=8)
    env.end_node()
    if cache_first:
        both = offloaded(apply_cache(model, cache), 0.0)
    else:
        both = apply_cache(offloaded(model, 0.0), cache)
    num_computed = count_computed(monkeypatch, model)
    assert sample(both, "flux", steps=8).equal(wanted)
    offload = report(both)["offload"]
    assert 0 < num_computed() < 8 * len(blocks(model))
    assert offload["blocks_skipped"] == 8 * len(blocks(model)) - num_computed()
    assert num_computed() <= offload["block_copies"] <= num_computed() + 1
    assert leftovers(model) == NOTHING


def count_computed(monkeypatch, model):
    """How often a block's own forward has run since."""
    count = [0]

    def counted(forward):
        @functools.wraps(forward)
        def count_and_run(*args, **kwargs):
            count[0] += 1
            return forward(*args, **kwargs)

        return count_and_run

    for kind in {type(block) for block in blocks(model)}:
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    return lambda: count[0]


def test_another_model_stays_loaded(env):
    """ComfyUI makes room for the budget, not for the size of the whole model."""
    a, b = load("wan"), load("wan")
    size = memory.weight_bytes(a)
    sample(a, "wan")
    env.end_node()
    env.device.total_bytes = env.device.held() + size // 2
    sample(offloaded(b, 0.1, -1), "wan")
    assert resident_share(a) > 0.95
    assert a.model in [entry.model.model for entry in management.current_loaded_models]


def test_without_the_accounting_the_other_is_evicted(env, monkeypatch):
    """Negative control of the check above, where ComfyUI evicts (classic)."""
    if env.manager == "dynamic":
        pytest.skip("dynamic models give way page by page, not by size")
    monkeypatch.setattr(budget.BudgetMixin, "model_size", lambda self: self.size)
    a, b = load("wan"), load("wan")
    size = memory.weight_bytes(a)
    sample(a, "wan")
    env.device.total_bytes = env.device.held() + size // 2
    sample(offloaded(b, 0.1, -1), "wan")
    assert resident_share(a) < 0.9


def test_class_without_diffusion_model_wrappers(env):
    model = load("sd3")
    full = sample(model, "sd3")
    env.end_node()
    budgeted = offloaded(model, 0.0)
    assert sample(budgeted, "sd3").equal(full)
    assert report(budgeted)["offload"]["block_copies"] > 0


def test_unet_with_deepcache(env):
    """The host walks the children of a level, and a reused call leaves whole levels out."""
    model = load("sd15")
    cache = CacheConfig(strategy="deepcache", warmup=1, deep_interval=2)
    wanted = [sample(m, "sd15", steps=4) for m in (model, apply_cache(model, cache))]
    env.end_node()
    streamed = offloaded(model, 0.0)
    runs = []
    for patched, latent in zip((streamed, apply_cache(streamed, cache)), wanted, strict=True):
        assert sample(patched, "sd15", steps=4).equal(latent)
        runs.append(report(patched)["offload"])
    plain, cached = runs
    assert cached["blocks_skipped"] > plain["blocks_skipped"]
    assert cached["block_copies"] < plain["block_copies"]
    assert leftovers(model) == NOTHING


def test_unknown_class_gets_the_cap_alone(env, monkeypatch):
    model = load("wan")
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    monkeypatch.setattr(budget, "find", lambda network: None)
    monkeypatch.setattr("slipstream.backends.offload.state.find", lambda network: None)
    with pytest.raises(OffloadError, match="WanModel has no block stack"):
        offloaded(model, 0.5)
    for mode in ("auto", "speed", "memory"):
        patched = in_mode(model, mode, 0.6)
        assert sample(patched, "wan", steps=STEPS).equal(full)
        assert "no block stack" in report(patched)["offload"]["no_prefetch"]
        assert resident_share(patched) <= 0.6
        env.end_node()


def test_missing_private_names(env, monkeypatch, caplog):
    """On a ComfyUI without the names the node does nothing, and says so once."""
    model = load("wan")
    full = sample(model, "wan")
    env.end_node()
    patched = in_mode(model, "auto", 0.3)
    if env.manager == "dynamic":
        monkeypatch.setattr(host, "_vbar_class", lambda: object)
        reason = "this comfy-aimdo has no set_watermark on its VBAR"
    else:
        monkeypatch.delattr("comfy.model_patcher.ModelPatcher.partially_unload")
        reason = "this ComfyUI has no partially_unload on its model patcher"
    with caplog.at_level(logging.INFO, "slipstream"):
        assert sample(patched, "wan").equal(full)
    assert sum(reason in record.message for record in caplog.records) == 1
    assert report(patched)["offload"]["reason"] == reason
    assert resident_share(model) > 0.95
    with pytest.raises(OffloadError, match=reason):
        offloaded(model, 0.5)


def test_missing_prefetch_names(env, monkeypatch):
    if env.manager == "classic":
        pytest.skip("classic prefetch uses none of ComfyUI's")
    monkeypatch.delattr("comfy.model_prefetch.prefetch_queue_pop")
    model = load("wan")
    full = sample(model, "wan")
    env.end_node()
    patched = in_mode(model, "speed", 0.5)
    assert sample(patched, "wan", steps=2).equal(full)
    assert "no comfy.model_prefetch.prefetch_queue_pop" in report(patched)["offload"]["no_prefetch"]
    assert resident_share(patched) <= 0.5


def test_classic_clone_of_a_dynamic_model_keeps_the_cap(env):
    """TorchCompileModel and weight hooks make one."""
    model = load("wan")
    full = sample(model, "wan")
    env.end_node()
    clone = offloaded(model, 0.3).clone(disable_dynamic=True)
    assert not memory.is_dynamic(clone)
    assert isinstance(clone, budget.BudgetMixin)
    assert sample(clone, "wan").equal(full)
    assert resident_share(clone) <= 0.3


def test_every_worker_gets_the_same_budget(env):
    """What rank 0 sends, on a worker: its own model is loaded under it, and without it again."""
    model = load("wan")
    gib = 0.3 * memory.weight_bytes(model) / GIB
    config = OffloadConfig(mode="manual", vram_budget_gb=gib, prefetch=-1)
    facts = RunFacts(
        id=1, sigmas=(1.0, 0.0), memory_bytes=0, techniques={"offload": config_fields(config)}
    )
    on_worker = LoadedModel(model)
    run = on_worker.begin(facts, lambda call, reuse: reuse)
    assert budget.config_of(run.patcher) == config
    assert resident_share(run.patcher) <= 0.3
    run.close()
    run = on_worker.begin(replace(facts, techniques={}), lambda call, reuse: reuse)
    if env.manager == "classic":  # dynamic fills when the blocks run
        assert resident_share(run.patcher) > 0.95
    assert budget.resident_cap(run.patcher) is None
    run.close()


@pytest.mark.parametrize(("share", "keep"), [(0.0, False), (0.0, True), (0.5, True)])
def test_svdquant_weights_stream(env, tmp_path, monkeypatch, share, keep):
    """4-bit layers of ours, in memory or mapped from their unpacked copy; their own patcher."""
    monkeypatch.setattr(host_cache, "cache_folder", lambda: tmp_path / "copies")
    monkeypatch.setattr(host_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(host_cache, "KEPT_FREE_BYTES", 0)
    file = tmp_path / "flux.safetensors"
    sizes = {"depth": 2, "single": 3, "context": 768, "vec": 768}
    svdquant_models.write(file, "flux", "nunchaku-1", **sizes)
    config = {"backend": "dequant", "dtype": "fp32"}
    full = sample(load_svdquant(str(file), {**config, "keep_unpacked": False}), "flux")
    env.end_node()
    model = load_svdquant(str(file), {**config, "keep_unpacked": keep})
    before = {path: path.read_bytes() for path in tmp_path.glob("copies/*.safetensors")}
    assert len(before) == keep
    fake_vbar.FakeModelMMAP.reads.clear()
    assert sample(model, "flux").equal(full)
    env.end_node()
    for prefetch in (-1, 0):
        budgeted = offloaded(model, share, prefetch)
        assert sample(budgeted, "flux").equal(full)
        assert (report(budgeted)["offload"]["block_copies"] > 0) == (prefetch == 0)
        env.end_node()
    assert leftovers(model) == NOTHING
    assert {path: path.read_bytes() for path in tmp_path.glob("copies/*.safetensors")} == before
    if env.manager == "dynamic" and keep:  # a layer is one slice of the file
        layers = {m.weight._qdata.nbytes for m in quantised_layers(model.model).values()}
        assert layers <= set(fake_vbar.FakeModelMMAP.reads)
