"""What the cache promises, on ComfyUI's own models, loaders, samplers and patches (CPU, fp32).

Random weights: relative errors compare mechanisms, never image quality.
"""

import itertools
import time

import cache_models
import pytest
import tiny
import torch
from cache_runs import (
    BlockCounter,
    alive_bytes,
    cached,
    equal,
    is_clean,
    network,
    notes,
    relerr,
    section,
)
from slipstream.backends.cache import CacheConfig, apply_cache, cachedit
from slipstream.backends.run import run_log

LISTS = {"flux": ("double_blocks", "single_blocks"), "wan": ("blocks",)}
ENGINES = ["builtin", "cache-dit"]
BOTH = pytest.mark.parametrize("family", ["flux", "wan"])

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(autouse=True)
def _cache_dit(request):
    wanted = getattr(request.node, "callspec", None)
    if wanted is not None and wanted.params.get("engine") == "cache-dit":
        pytest.importorskip("cache_dit")


@pytest.fixture(scope="module")
def models(comfy):
    return {family: cache_models.load(family) for family in LISTS}


def sample(model, family, **how):
    return tiny.sample(model, family, **{"steps": 20, **how})


# ------------------------------------------------------------------ what really runs


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_blocks_do_not_run(models, family, engine):
    model = models[family]
    counter = BlockCounter(model, LISTS[family])
    reference = sample(model, family)
    plain = counter.take()
    assert plain == 20 * cache_models.NUM_BLOCKS[family]
    patched = cached(model, "cache-dit", engine=engine, residual_diff_threshold=0.15)
    out = sample(patched, family)
    computed = counter.take()
    counter.remove()
    found = section(patched)
    assert computed == found["blocks_computed"]
    assert plain == computed + found["blocks_skipped"]
    assert found["hits"] >= 9
    assert 0 < relerr(reference, out) < 0.05


def test_cache_dit_decides(models, monkeypatch):
    pytest.importorskip("cache_dit")
    from cache_dit.caching import CachedContextManager

    answers = []
    can_cache = CachedContextManager.can_cache

    def spy(self, *args, **kwargs):
        answers.append(can_cache(self, *args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(CachedContextManager, "can_cache", spy)
    patched = apply_cache(models["flux"], CacheConfig.from_ratio(0.5, strategy="cache-dit"))
    sample(patched, "flux")
    decided = [d["reused"] for d in section(patched)["decisions"] if d["diff"] or d["reason"] in
               ("max_continuous", "below threshold", "above threshold")]  # fmt: skip
    assert len(answers) == 15, "every step between warmup and cooldown was asked"
    assert answers == decided
    assert any(answers)
    assert section(patched)["engine"].startswith("cache-dit 1.")


def test_engines_agree_on_a_whole_run(models):
    pytest.importorskip("cache_dit")
    for how in ({"split": True}, {"sampler": "heun"}, {"sampler": "dpmpp_sde"}):
        for settings in ({"calibrator": "taylorseer"}, {"cfg_mode": "separate"}):
            logs, outs = [], []
            for engine in ENGINES:
                patched = cached(models["wan"], "cache-dit", engine=engine,
                                 residual_diff_threshold=0.4, **settings)  # fmt: skip
                outs.append(sample(patched, "wan", steps=12, **how))
                logs.append([(d["reused"], d["diff"]) for d in section(patched)["decisions"]])
            assert logs[0] == logs[1]
            assert torch.equal(*outs)
            assert any(reused for reused, _ in logs[0])


@BOTH
def test_half_ratio_runs_blocks_1_8_times_less_often(models, family):
    """The number of the issue: 1.8x fewer block computations at cache_ratio 0.5, 20 steps."""
    patched = apply_cache(models[family], CacheConfig.from_ratio(0.5))
    sample(patched, family)
    found = section(patched)
    total = found["blocks_computed"] + found["blocks_skipped"]
    assert total / found["blocks_computed"] >= 1.8


@pytest.mark.parametrize(
    ("strategy", "calibrator", "threshold"),
    [
        ("auto", "taylorseer", 0.48),
        ("taylorseer", "taylorseer", 0.48),
        ("output", "taylorseer", 0.24),
        ("cache-dit", "none", 0.24),
        ("fbcache", "none", 0.24),
    ],
)
def test_what_is_extrapolated_and_at_which_threshold(models, strategy, calibrator, threshold):
    patched = apply_cache(models["wan"], CacheConfig.from_ratio(0.5, strategy=strategy))
    sample(patched, "wan", steps=8)
    found = section(patched)
    assert found["settings"]["calibrator"] == calibrator
    assert found["threshold"] == pytest.approx(threshold)


def test_scm_extrapolates_and_is_closer_for_it(models):
    plain = sample(models["wan"], "wan")
    patched = apply_cache(models["wan"], CacheConfig.from_ratio(0.5, strategy="scm"))
    extrapolated = sample(patched, "wan")
    found = section(patched)
    assert found["settings"]["calibrator"] == "taylorseer"
    repeating = cached(models["wan"], "cache-dit", scm="off", residual_diff_threshold=0.99,
                       warmup=4, max_continuous_cached_steps=1)  # fmt: skip
    repeated = sample(repeating, "wan")
    assert section(repeating)["hits"] <= found["hits"]
    assert relerr(extrapolated, plain) < relerr(repeated, plain)


@BOTH
def test_time_drops(models, family):
    """Two thirds of the steps reused: well below the plain time even on a busy machine."""
    patched = cached(models[family], "scm", cache_ratio=1.0, warmup=1)
    shape = (1, 16, 32, 32) if family == "flux" else (1, 16, 2, 24, 24)
    seconds = {}
    for name, model in (("cached", patched), ("plain", models[family])):
        start = time.process_time()  # of this process: the machine may be shared
        sample(model, family, steps=16, cfg=1.0, shape=shape)
        seconds[name] = time.process_time() - start
    assert section(patched)["hits"] == 11
    assert seconds["cached"] < 0.8 * seconds["plain"]


# ------------------------------------------------------------------ nothing else changes


@pytest.mark.parametrize("strategy", ["cache-dit", "scm", "output", "pab", "fastercache-cfg"])
def test_models_without_the_node_are_untouched(models, strategy):
    """Before, while and after a cached run of a clone, bit for bit."""
    model = models["flux"]
    plain = sample(model, "flux", steps=8)  # ComfyUI's own loading adds attributes, once
    attributes = {name: set(m.__dict__) for name, m in network(model).named_modules()}
    options = dict(model.model_options["transformer_options"])
    call = torch.randn(tiny.latent_shape("flux")), torch.tensor([0.5]), torch.randn(1, 8, 768)
    alone = network(model)(*call, guidance=torch.ones(1))
    meanwhile = []

    def callback(step, *rest):  # between two model calls of the cached run
        if step == 6:
            meanwhile.append(network(model)(*call, guidance=torch.ones(1)))

    patched = cached(model, strategy)
    out = sample(patched, "flux", steps=8, callback=callback)
    assert section(patched)["hits"] > 0
    assert not equal(out, plain)
    assert torch.equal(meanwhile[0], alone)
    assert torch.equal(sample(model, "flux", steps=8), plain)
    assert {name: set(m.__dict__) for name, m in network(model).named_modules()} == attributes
    assert model.model_options["transformer_options"] == options
    assert not model.get_attachment("slipstream.log")


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [("cache-dit", e) for e in ENGINES] + [(s, "builtin") for s in ("output", "pab", "scm")],
)
def test_nothing_is_held_after_a_run_an_interrupt_and_an_exception(models, strategy, engine):
    import comfy.model_management

    patched = cached(models["wan"], strategy, engine=engine)
    sample(patched, "wan", steps=12)  # caches of torch and of the loader fill up
    before = alive_bytes()
    sample(patched, "wan", steps=12)
    assert section(patched)["peak_bytes"] > 0
    assert alive_bytes() == before

    for error in (comfy.model_management.InterruptProcessingException, RuntimeError):

        def callback(step, *rest, error=error):
            if step == 8:
                raise error

        with pytest.raises(error):
            sample(patched, "wan", steps=12, callback=callback)
        assert section(patched)["hits"] > 0
        assert not run_log(patched).latest().completed
        assert alive_bytes() == before
        assert is_clean(patched)


def test_an_exception_inside_a_block_leaves_no_override(models):
    model = cache_models.load("wan")
    block = network(model).blocks[5]
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the block")

    block.ffn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the block"):
        sample(cached(model), "wan", steps=12)
    assert is_clean(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_repeat_bit_for_bit_whatever_ran_before(models, engine):
    patched = cached(models["flux"], "cache-dit", engine=engine, calibrator="taylorseer")
    first = sample(patched, "flux")
    decisions = section(patched)["decisions"]
    sample(patched, "flux", seed=5)
    sample(patched, "flux", steps=7, positive=tiny.text("flux", seed=9), split=True)
    assert torch.equal(sample(patched, "flux"), first)
    assert section(patched)["decisions"] == decisions
    assert decisions[0]["reason"] == "first"


@pytest.mark.parametrize("strategy", ["output", "fastercache-cfg", "cache-dit"])
def test_the_samplers_latent_is_never_written_to(models, strategy):
    """fp32 throughout: adding in place would change the sampler's own x (core EasyCache does)."""
    import comfy.samplers

    changed = []

    def watched(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for i in range(len(sigmas) - 1):
            before = x.clone()
            denoised = denoise(x, sigmas[i] * ones, **(extra_args or {}))
            changed.append(not torch.equal(x, before))
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    patched = cached(models["flux"], strategy)
    custom(patched, "flux", comfy.samplers.KSAMPLER(watched), steps=12)
    assert section(patched)["hits"] > 0
    assert changed == [False] * 12


# ------------------------------------------------------------------ steps, evaluations, branches


@pytest.mark.parametrize(
    ("steps", "engine"),
    [(n, "builtin") for n in (1, 2, 3, 4, 5, 6, 7, 8, 20, 50)]
    + [(7, "cache-dit"), (8, "cache-dit")],
)
def test_every_number_of_steps_behaves(models, steps, engine):
    patched = cached(models["flux"], "auto", engine=engine)
    out = sample(patched, "flux", steps=steps)
    found = section(patched)
    assert torch.isfinite(out).all()
    assert found["evaluations"] == steps
    assert found["strategy"] == ("scm" if steps < 8 else "cache-dit")
    first, last = found["decisions"][0], found["decisions"][-1]
    assert not first["reused"]
    assert not last["reused"]
    if steps >= 3:
        assert found["hits"] > 0
    if steps < 12:
        assert any("warmup is" in note for note in notes(patched))


@BOTH
@pytest.mark.parametrize("cfg_mode", ["shared", "separate"])
def test_split_branches_are_as_good_as_batched_ones(models, family, cfg_mode):
    errors, hits = {}, {}
    for split in (False, True):
        reference = sample(models[family], family, cfg=4.0, split=split)
        patched = cached(models[family], "cache-dit", cfg_mode=cfg_mode)
        out = sample(patched, family, cfg=4.0, split=split)
        errors[split], hits[split] = relerr(reference, out), section(patched)["hits"]
        branches = {d["branch"] for d in section(patched)["decisions"]}
        assert branches == ({"cond", "uncond"} if split else {"uncond+cond"})
    assert hits[True] >= 0.8 * hits[False] > 0
    assert errors[True] < 1.5 * errors[False]


def test_swapped_branches_would_be_noticed(models, monkeypatch):
    """Negative control: one key for both branches, as a cache that counts calls has it."""
    from slipstream.backends import run as run_module
    from slipstream.backends.cache import blocks

    reference = sample(models["wan"], "wan", cfg=4.0, split=True)
    patched = cached(models["wan"], "cache-dit")
    good = relerr(reference, sample(patched, "wan", cfg=4.0, split=True))
    begin_call = run_module.Run.begin_call

    def one_key(self, options):
        call = begin_call(self, options)
        call.key = run_module.BranchKey(("one",), 0, None)
        return call

    monkeypatch.setattr(run_module.Run, "begin_call", one_key)
    monkeypatch.setattr(blocks, "signature_of", lambda args: ())
    assert relerr(reference, sample(patched, "wan", cfg=4.0, split=True)) > 2 * good


@pytest.mark.parametrize(
    ("sampler", "engine"),
    [("heun", "builtin"), ("heun", "cache-dit"), ("dpmpp_sde", "cache-dit"),
     ("dpmpp_2m_sde", "builtin"), ("euler_ancestral", "builtin")],
)  # fmt: skip
def test_samplers_with_more_evaluations_than_steps(models, sampler, engine):
    reference = sample(models["wan"], "wan", sampler=sampler)
    patched = cached(models["wan"], "cache-dit", engine=engine, calibrator="taylorseer")
    out = sample(patched, "wan", sampler=sampler)
    found = section(patched)
    num_evaluations = {"heun": 39, "dpmpp_sde": 39}.get(sampler, 20)
    assert found["evaluations"] == num_evaluations
    assert [d["evaluation"] for d in found["decisions"]] == list(range(num_evaluations))
    assert not any(d["reused"] for d in found["decisions"] if d["step"] in (0, 1, 2, 3, 19))
    assert found["hits"] > 0.4 * num_evaluations
    assert relerr(reference, out) < (0.05 if sampler in ("heun", "dpmpp_sde") else 0.25)
    fell_back = any("instead of extrapolating" in note for note in notes(patched))
    assert fell_back == (sampler == "heun")


def custom(model, family, sampler, *, steps=20, sigmas=None):
    import comfy.sample
    import comfy.samplers

    empty = tiny.latent(family)
    sampling = model.get_model_object("model_sampling")
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    return comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(empty, 1), 2.0, sampler, sigmas,
        tiny.text(family, seed=1), tiny.text(family, seed=2), empty, disable_pbar=True, seed=1,
    )  # fmt: skip


def restart(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
    """Down, up again by noise, down: as restart samplers do."""
    generator = torch.Generator().manual_seed(0)
    ones = x.new_ones([x.shape[0]])
    path = [*sigmas[:12], *sigmas[6:12], *sigmas[6:]]
    for sigma, following in itertools.pairwise(path):
        denoised = denoise(x, sigma * ones, **(extra_args or {}))
        if following > sigma:
            noise = torch.randn(x.shape, generator=generator)
            x = x + noise * (following - sigma)
        else:
            x = x + (x - denoised) / sigma * (following - sigma)
    return x


@pytest.mark.parametrize("engine", ENGINES)
def test_restart_samplers_do_not_extrapolate_across_the_jump(models, engine):
    import comfy.samplers

    sampler = comfy.samplers.KSAMPLER(restart)
    reference = custom(models["wan"], "wan", sampler)
    errors = {}
    for calibrator in ("none", "taylorseer"):
        patched = cached(models["wan"], "cache-dit", engine=engine, calibrator=calibrator)
        errors[calibrator] = relerr(reference, custom(patched, "wan", sampler))
        assert section(patched)["hits"] > 0
    assert any("instead of extrapolating" in note for note in notes(patched))
    assert errors["taylorseer"] < 1.5 * errors["none"] + 0.01


def test_partial_denoise_and_advanced_samplers_count_their_own_steps(models):
    patched = cached(models["flux"], "fbcache")
    sampling = patched.get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 20)
    custom(patched, "flux", comfy.samplers.sampler_object("euler"), sigmas=sigmas[8:])
    found = section(patched)
    assert found["evaluations"] == 12
    assert [d["step"] for d in found["decisions"]] == list(range(12))
    assert [d["reused"] for d in found["decisions"][:4]] == [False] * 4


# ------------------------------------------------------------------ missing packages, bad input


def test_auto_without_cache_dit_uses_the_built_in_engine_and_says_so(models, monkeypatch):
    monkeypatch.setattr(cachedit.importlib.util, "find_spec", lambda name: None)
    patched = apply_cache(models["flux"], CacheConfig.from_ratio(0.5, strategy="cache-dit"))
    sample(patched, "flux")
    assert section(patched)["engine"] == "builtin"
    assert section(patched)["hits"] > 0
    (note,) = [n for n in notes(patched) if "Built-in" in n]
    assert "pip install cache-dit diffusers" in note


def test_import_of_cache_dit_leaves_the_environment_as_it_was():
    pytest.importorskip("cache_dit")
    import os
    import subprocess
    import sys

    from comfy_home import PACK_ROOT

    code = (
        "import os, sys; sys.path.insert(0, 'tests'); import comfy_home; comfy_home.load_pack();"
        "before = dict(os.environ);"
        "from slipstream.backends.cache import cachedit;"
        "assert 'cache_dit' not in sys.modules;"
        "assert cachedit.unavailable() is None; assert 'cache_dit' in sys.modules;"
        "assert dict(os.environ) == before"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=PACK_ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    ("family", "settings", "steps", "sentence"),
    [
        ("flux", {"strategy": "deepcache"}, 8,
         "deepcache needs a UNet (SD1.5, SDXL); this is Flux: use cache-dit."),
        ("z_image", {"strategy": "teacache"}, 8,
         "teacache has no coefficients for NextDiT: use cache-dit."),
        ("wan_animate2", {"strategy": "cache-dit"}, 8,
         "WanAnimate2Model has no block stack in backends/architectures: use strategy output or "
         "auto."),
        ("sd15", {"strategy": "cache-dit"}, 8,
         "cache-dit needs a transformer; this is Stable Diffusion U-Net: use deepcache."),
        ("flux", {"strategy": "cache-dit"}, 4,
         "cache-dit needs 6 steps or more, this run has 4: use scm."),
        ("flux", {"strategy": "cache-dit", "cache_ratio": None, "front_blocks": 4,
                  "back_blocks": 1}, 8,
         "front_blocks 4 + back_blocks 1 leave nothing to skip in 5 blocks."),
        ("flux", {"strategy": "cache-dit", "scm": "6,1,3"}, 8,
         "scm counts add up to 10, the run has 8 steps."),
        ("pixart", {"strategy": "pab"}, 8,
         "pab repeats attention outputs, and the attention of PixArt does not pass through "
         "ComfyUI's hook: use cache-dit."),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_before_the_first_model_call(
    family, settings, steps, sentence
):
    model = tiny.load(family)
    counter = []
    handle = network(model).register_forward_pre_hook(lambda *args: counter.append(1))
    config = CacheConfig(**{"cache_ratio": 0.5, "engine": "builtin", **settings})
    with pytest.raises(ValueError) as error:
        tiny.sample(apply_cache(model, config), family, steps=steps)
    handle.remove()
    assert str(error.value) == sentence
    assert counter == []


def test_explicit_engine_without_cache_dit_is_refused_with_the_pip_line(models, monkeypatch):
    monkeypatch.setattr(cachedit.importlib.util, "find_spec", lambda name: None)
    patched = cached(models["flux"], "cache-dit", engine="cache-dit")
    with pytest.raises(ValueError) as error:
        sample(patched, "flux")
    assert str(error.value) == (
        "cache-dit is not installed: pip install cache-dit diffusers, or set engine to builtin."
    )


def test_nothing_reused_is_a_warning_with_a_threshold_that_would_have_worked(models):
    patched = cached(models["wan"], "cache-dit", residual_diff_threshold=0.001)
    sample(patched, "wan")
    assert section(patched)["hits"] == 0
    (note,) = [n for n in notes(patched) if "reused nothing" in n]
    better = float(note.split("a threshold of ")[1].split(" ")[0])
    again = cached(models["wan"], "cache-dit", residual_diff_threshold=better)
    sample(again, "wan")
    assert 4 <= section(again)["hits"] <= 12


def test_warmup_over_the_whole_run_is_a_warning(models):
    config = CacheConfig(strategy="cache-dit", engine="builtin", warmup=8, front_blocks=1)
    patched = apply_cache(models["flux"], config)
    sample(patched, "flux", steps=8)
    assert any("warmup and cooldown cover all steps" in note for note in notes(patched))


def test_switched_off_by_the_environment(models, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_DISABLE", "cache")
    plain = sample(models["flux"], "flux", steps=8)
    patched = cached(models["flux"], "cache-dit")
    assert torch.equal(sample(patched, "flux", steps=8), plain)
    assert "cache" not in run_log(patched).latest().to_json()
