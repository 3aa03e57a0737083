"""Sequence parallel beside core's samplers, guiders and guidance nodes: equal to one device."""

import json

import comfy_home
import fake_kernels
import pytest
import tiny
import torch
from fake_kernels import FakeKernel
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.run import current, run_log
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig

pytestmark = pytest.mark.usefixtures("comfy", "workers")
EQUAL = 2e-6
WORKFLOWS = sorted((comfy_home.PACK_ROOT / "workflows" / "api").glob("*.json"))


@pytest.fixture(scope="module")
def workers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    pool().close()
    torch.set_num_threads(threads)


def parallel(model, **fields):
    fields = {"devices": "cpu,cpu", "timeout_s": 30, **fields}
    return apply_parallel(model, SequenceParallelConfig(**fields))


def section(model, name="parallel"):
    return run_log(model).latest().to_json()[name]


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- samplers


def samplers_of(workflow):
    """Family of tiny models, and settings of the KSampler, of a shipped workflow."""
    nodes = json.loads(workflow.read_text()).values()
    family = "wan" if any("wan" in str(node["inputs"]) for node in nodes) else "flux"
    settings = next(node["inputs"] for node in nodes if node["class_type"] == "KSampler")
    return family, {
        "sampler": settings["sampler_name"],
        "scheduler": settings["scheduler"],
        "cfg": settings["cfg"],
    }


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_sampler_of_every_shipped_workflow(workflow):
    family, settings = samplers_of(workflow)
    model = tiny.load(family)
    expected = tiny.sample(model, family, steps=4, **settings)
    shared = parallel(model)
    assert relative(tiny.sample(shared, family, steps=4, **settings), expected) <= EQUAL
    assert section(shared)["calls_local"] == 0, section(shared)["reasons"]


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2"])
@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_uni_pc(sampler, cfg):
    """Core expands its timestep: one element of stride 0."""
    model = tiny.load("flux")
    settings = {"steps": 4, "sampler": sampler, "cfg": cfg}
    expected = tiny.sample(model, "flux", **settings)
    assert relative(tiny.sample(parallel(model), "flux", **settings), expected) <= EQUAL


# --- kernels that fail late


@pytest.mark.parametrize("strategy", [None, "scm"])
def test_nan_in_a_shared_evaluation_is_computed_again_on_one_device(strategy):
    """Whose kernel it was cannot be seen from here; a cache must not reuse what it made of it."""
    model = tiny.load("flux", heads=3)
    plain = tiny.sample(model, "flux", steps=8, cfg=1.0)
    known, policies = fake_kernels.table(FakeKernel("late", bad=range(12, 10_000)))
    config = AttentionConfig(
        min_tokens=0, dense_first_steps=0, dense_last_steps=0, autotune=False, probe=False
    )
    noded = parallel(apply_attention(model, config, kernels=known, policies=policies))
    if strategy is not None:
        noded = apply_cache(noded, CacheConfig(strategy=strategy, front_blocks=1, warmup=1))
    out = tiny.sample(noded, "flux", steps=8, cfg=1.0)
    assert torch.isfinite(out).all()
    record = run_log(noded).latest()
    assert any("computed again on one device" in note for note in record.notes)
    assert section(noded)["calls_distributed"] > 0
    if strategy is None:
        assert relative(out, plain) <= 1e-5
    else:
        assert section(noded, "cache")["hits"] > 0


# --- guiders


def dual(model, other, *, cfg=3.0, steps=3):
    """A run of DualModelGuider: the positive prompt on `model`, the negative one on `other`."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    positive, negative = (tiny.text("flux", seed=seed) for seed in (1, 2))
    (guider,) = DualModelGuider.execute(model, positive, cfg, other, negative).args
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )
    empty = tiny.latent("flux")
    return guider.sample(
        comfy.sample.prepare_noise(empty, 1), empty, comfy.samplers.sampler_object("euler"),
        sigmas, disable_pbar=True, seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
def test_a_guider_with_another_file(both):
    model, other = (tiny.load("flux", seed=seed) for seed in (0, 1))
    expected = dual(model, other)
    assert relative(dual(model, model), expected) > 1e-3, "the other file must matter"
    shared = parallel(model, timeout_s=8)
    assert relative(dual(shared, parallel(other) if both else other), expected) <= EQUAL
    found = section(shared)
    assert found["calls_distributed"] == found["calls_local"] == 3
    assert list(found["reasons"]) == ["the network of another MODEL"]


# --- guidance that needs both prompts in one call


@pytest.mark.parametrize("cfg", [1.0, 4.5])
@pytest.mark.parametrize("first", ["guidance", "parallel"])
def test_normalized_attention_guidance(cfg, first):
    from comfy_extras.nodes_nag import NAGuidance

    def guided(model):
        return NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]

    model = tiny.load("flux")
    settings = {"steps": 3, "cfg": cfg}
    expected = tiny.sample(guided(model), "flux", **settings)
    assert relative(tiny.sample(model, "flux", **settings), expected) > 1e-2
    shared = parallel(guided(model)) if first == "guidance" else guided(parallel(model))
    assert relative(tiny.sample(shared, "flux", **settings), expected) <= EQUAL
    found = section(shared)
    assert found["calls_local"] == 3, "both prompts of a step are one call, as without the node"


# --- one call of a step runs alone


STATIC = CacheConfig(
    strategy="scm", scm="2,1,1,2,1,1", scm_policy="static", warmup=0, engine="builtin",
    front_blocks=1,
)  # fmt: skip


def skip_layers(model):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    node = SkipLayerGuidanceDiT.execute
    return node(model, 3.0, 0.0, 1.0, "1", "1", 0.0).args[0]


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize("first", ["cache", "parallel"])
def test_a_call_that_runs_alone_leaves_the_cache_its_reuse(family, first):
    model = skip_layers(tiny.load(family))
    settings = {"steps": 8, "cfg": 4.5}
    cached = apply_cache(model, STATIC)
    expected = tiny.sample(cached, family, **settings)
    skipped = section(cached, "cache")["blocks_skipped"]
    assert skipped > 0
    both = parallel(cached) if first == "cache" else apply_cache(parallel(model), STATIC)
    out = tiny.sample(both, family, **settings)
    assert section(both, "cache")["blocks_skipped"] == skipped
    found = section(both)
    assert found["calls_distributed"] > 0
    assert found["calls_local"] > 0
    assert relative(out, expected) <= 5e-6


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_a_worker_lost_before_a_step_that_reuses(family):
    """SD3's cache decides before the call is handed over, Wan's within it."""
    model = tiny.load(family, heads=3)
    shared = parallel(apply_cache(model, STATIC))
    expected = tiny.sample(shared, family, steps=8)
    usual = section(shared, "cache")

    def kill(step, *_):
        if step == 1:  # the third step would reuse
            for worker in pool().workers:
                worker.handle._process.kill()
                worker.handle._process.wait()

    out = tiny.sample(shared, family, steps=8, callback=kill)
    found = section(shared, "cache")
    assert 0 < found["blocks_skipped"] < usual["blocks_skipped"]
    assert section(shared)["calls_local"] == 0
    assert relative(out, expected) < 0.5
    assert relative(tiny.sample(shared, family, steps=8), expected) <= EQUAL


def test_sharing_that_stops_within_a_run_leaves_the_cache_whole():
    """What rank 0 has of a shared call is of its own tokens: useless for a call on one device."""
    model = tiny.load("wan")
    config = CacheConfig(
        strategy="fbcache", engine="builtin", warmup=1, residual_diff_threshold=0.9
    )
    shared = parallel(apply_cache(model, config))

    def stop_after_four(executor, *args, **kwargs):
        state = current(executor.class_obj.model_options["transformer_options"]).states["parallel"]
        if state.counts.shared == 4 and not state.reason:
            state.stop_sharing("a test")
        return executor(*args, **kwargs)

    shared.add_wrapper_with_key("predict_noise", "test", stop_after_four)
    out = tiny.sample(shared, "wan", steps=10)
    found = section(shared)
    assert (found["calls_distributed"], found["calls_local"]) == (4, 6)
    late = [one for one in section(shared, "cache")["decisions"] if one["evaluation"] >= 4]
    assert late[0]["reason"] == "first", "nothing of the shared calls fits"
    assert any(one["reused"] for one in late)
    assert torch.isfinite(out).all()


# --- attributes that nodes replace


def with_dtype(model, dtype):
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    return ModelComputeDtype().patch(model, dtype)[0]


@pytest.mark.parametrize("family", ["flux", "wan", "sd3"])
@pytest.mark.parametrize("first", ["dtype", "parallel"])
def test_a_compute_dtype_of_full_width(family, first):
    model = tiny.load(family, heads=3)
    expected = tiny.sample(with_dtype(model, "fp32"), family)
    shared = parallel(with_dtype(model, "fp32"))
    if first == "parallel":
        shared = with_dtype(parallel(model), "fp32")
    assert relative(tiny.sample(shared, family), expected) <= EQUAL
    assert section(shared)["calls_local"] == 0, section(shared)["reasons"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_narrower_compute_dtype(dtype):
    """Its rounding shows that it has travelled; afterwards the workers are as before.

    Equal it cannot be: one device has both prompts in one batch, and rounds otherwise.
    """
    model = tiny.load("wan")
    plain = tiny.sample(model, "wan")
    narrow = with_dtype(model, dtype)
    expected = tiny.sample(narrow, "wan")
    effect = relative(plain, expected)
    assert effect > 1e-4
    shared = parallel(narrow)
    out = tiny.sample(shared, "wan")
    assert effect / 2 < relative(out, plain) < effect * 2
    assert section(shared)["calls_local"] == 0
    assert relative(tiny.sample(parallel(model), "wan"), plain) <= EQUAL
    assert torch.equal(tiny.sample(model, "wan"), plain)


def test_a_replaced_layer_stays_here():
    model = tiny.load("wan")
    model.add_object_patch("diffusion_model.head", model.model.diffusion_model.head)
    model.add_object_patch("diffusion_model.out_dim", 16)
    shared = parallel(model)
    assert torch.equal(tiny.sample(shared, "wan"), tiny.sample(model, "wan"))
    (reason,) = section(shared)["reasons"]
    assert "diffusion_model.head is a " in reason
    assert reason.endswith("cannot travel to workers")


def test_a_plain_value_of_the_network_travels():
    model = tiny.load("wan", heads=3)
    model.add_object_patch("diffusion_model.freq_dim", model.model.diffusion_model.freq_dim)
    other = model.clone()
    other.add_object_patch("diffusion_model.blocks.0.norm1.eps", 0.5)
    expected = tiny.sample(other, "wan")
    assert relative(tiny.sample(model, "wan"), expected) > 1e-4
    assert relative(tiny.sample(parallel(other), "wan"), expected) <= EQUAL
    assert relative(tiny.sample(parallel(model), "wan"), tiny.sample(model, "wan")) <= EQUAL
