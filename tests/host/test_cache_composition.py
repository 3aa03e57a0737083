"""The cache with guidance patches, ControlNet, windows, areas, compile and other caches."""

import cache_models
import pytest
import tiny
import torch
from cache_runs import cached, equal, is_clean, network, notes, relerr, section
from slipstream.backends.cache import CacheConfig, apply_cache, blocks
from slipstream.backends.calls import CALL
from slipstream.backends.conflicts import ConflictError

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(scope="module")
def models(comfy):
    return {family: cache_models.load(family) for family in ("flux", "wan")}


def sample(model, family, **how):
    return tiny.sample(model, family, **{"steps": 20, **how})


def guided(model, **settings):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(
        model, settings.get("scale", 3.0), 0.0, 1.0, double_layers="3, 4", single_layers="",
        rescaling_scale=0.0,
    ).args[0]  # fmt: skip


# ------------------------------------------------------------------ guidance, areas, windows


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("order", ["guidance first", "cache first"])
def test_skip_layer_guidance_keeps_its_own_state(models, split, order):
    """It calls the model again with the same conds and blocks 3 and 4 left out."""
    model = guided(models["wan"])
    reference = sample(model, "wan", cfg=4.0, split=split)
    effect = relerr(sample(models["wan"], "wan", cfg=4.0, split=split), reference)
    patched = cached(model) if order == "guidance first" else guided(cached(models["wan"]))
    out = sample(patched, "wan", cfg=4.0, split=split)
    branches = {d["branch"] for d in section(patched)["decisions"]}
    assert branches == ({"cond", "uncond", "cond, call 2"} if split else {"uncond+cond", "cond"})
    assert section(patched)["hits"] >= 10
    assert relerr(reference, out) < 0.25 * effect


def test_a_skipped_last_block_is_not_waited_for(models):
    """The block that adds the residual may be the one that guidance leaves out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    model = SkipLayerGuidanceDiT.execute(
        models["wan"], 3.0, 0.0, 1.0, double_layers="9", single_layers="", rescaling_scale=0.0
    ).args[0]
    reference = sample(model, "wan", cfg=4.0)
    patched = cached(model)
    assert relerr(reference, sample(patched, "wan", cfg=4.0)) < 0.05
    assert section(patched)["hits"] >= 10


def test_a_patched_first_block_leaves_nothing_to_compare(models):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    model = SkipLayerGuidanceDiTSimple.execute(
        models["wan"], 0.0, 1.0, double_layers="0", single_layers=""
    ).args[0]
    patched = cached(model, cfg_mode="separate")
    out = sample(patched, "wan", cfg=4.0)
    reasons = {d["branch"]: d["reason"] for d in section(patched)["decisions"][8:-4]}
    assert torch.isfinite(out).all()
    assert "no metric" in reasons.values()


def test_perturbed_attention_guidance(comfy):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    plain = tiny.load("sd15")
    model = PerturbedAttentionGuidance.execute(plain, 3.0).args[0]
    reference = tiny.sample(model, "sd15", steps=8)
    patched = cached(model, "deepcache", warmup=2)
    out = tiny.sample(patched, "sd15", steps=8)
    branches = {d["branch"] for d in section(patched)["decisions"]}
    assert branches == {"uncond+cond", "cond"}
    assert section(patched)["hits"] > 0
    effect = relerr(tiny.sample(plain, "sd15", steps=8), reference)
    assert relerr(reference, out) < 0.5 * effect


def test_area_prompts(models):
    left, right = tiny.text("flux", seed=1), tiny.text("flux", seed=7)
    for cond, x in ((left, 0), (right, 8)):
        cond[0][1] |= {"area": (16, 8, 0, x), "strength": 1.0, "set_area_to_bounds": False}
    whole = tiny.text("flux", seed=3)
    conds = [*left, *right, *whole]
    reference = sample(models["flux"], "flux", positive=conds)
    patched = cached(models["flux"])
    out = sample(patched, "flux", positive=conds)
    assert len({d["branch"] for d in section(patched)["decisions"]}) >= 2
    assert section(patched)["hits"] >= 10
    assert relerr(reference, out) < 0.05


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_context_windows_keep_their_own_state(models, schedule):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = ContextWindowsManualNode.execute(
        models["wan"], 4, 2, schedule, 1, False, "pyramid", 2, False, cond_retain_index_list="",
        split_conds_to_windows=False, latent_retain_index_list="", causal_window_fix=False,
    ).args[0]  # fmt: skip
    shape = (1, 16, 9, 8, 8)
    reference = sample(model, "wan", shape=shape, steps=12)
    patched = cached(model)
    out = sample(patched, "wan", shape=shape, steps=12)
    branches = {d["branch"] for d in section(patched)["decisions"]}
    assert len(branches) >= 3
    assert all("frames" in branch for branch in branches)
    assert relerr(reference, out) < 0.05
    if schedule == "standard_static":
        assert section(patched)["hits"] >= 5


# ------------------------------------------------------------------ ControlNet and in-place blocks


def controlled(model):
    """ControlNet's residuals, as Flux gets them: added between the blocks, other ones each step."""
    generator = torch.Generator().manual_seed(5)
    adds = {
        name: [torch.randn(1, 64, 128, generator=generator) * 0.3 for _ in range(count)]
        for name, count in (("input", 6), ("output", 8))
    }

    def control(executor, *args, **kwargs):
        args = list(args)
        batch, t = args[0].shape[0], args[1].flatten()[0]
        args[6] = {k: [x.repeat(batch, 1, 1) * (0.5 + t) for x in v] for k, v in adds.items()}
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "test.control", control)
    return clone


@pytest.mark.parametrize("order", ["control first", "cache first"])
def test_control_residuals_are_kept(models, order, monkeypatch):
    mask = {"strategy": "scm", "cache_ratio": 0.75}
    reference = sample(controlled(models["flux"]), "flux")

    def error():
        if order == "control first":
            patched = cached(controlled(models["flux"]), **mask)
        else:
            patched = controlled(cached(models["flux"], **mask))
        out = sample(patched, "flux")
        assert section(patched)["hits"] >= 10
        return relerr(reference, out)

    kept = error()
    # negative control: last minus first, which takes the adds of an old step for the blocks' own
    monkeypatch.setattr(blocks, "adds_between", lambda *args: False)
    monkeypatch.setattr(blocks.BorderCheck, "close", lambda self: (False, False))
    assert kept < 0.5 * error()


def test_an_unknown_add_between_blocks_is_noticed_in_the_first_call(models, monkeypatch):
    """Another pack may write between the blocks without ComfyUI's control or patches."""
    monkeypatch.setattr(blocks, "adds_between", lambda *args: False)
    reference = sample(controlled(models["flux"]), "flux")
    patched = cached(controlled(models["flux"]), "scm", cache_ratio=0.75)
    assert relerr(reference, sample(patched, "flux")) < 0.1


@pytest.mark.parametrize("family", ["flux", "ltxv"])
def test_blocks_that_write_in_place_do_not_poison_the_residual(family):
    """Without a clone of the input the change would be compared with itself: NaN or zero."""
    model = tiny.load(family)
    patched = cached(model)
    tiny.sample(patched, family, steps=12)
    diffs = [d["diff"] for d in section(patched)["decisions"] if d["diff"] is not None]
    assert len(diffs) >= 4
    assert all(diff > 0 for diff in diffs)
    assert section(patched)["hits"] > 0


def test_free_u_under_deepcache(comfy):
    from comfy_extras.nodes_freelunch import FreeU_V2

    model = FreeU_V2.execute(tiny.load("sd15"), 1.3, 1.4, 0.9, 0.2).args[0]
    reference = tiny.sample(model, "sd15", steps=8)
    patched = cached(model, "deepcache", warmup=2)
    assert relerr(reference, tiny.sample(patched, "sd15", steps=8)) < 0.02
    assert section(patched)["hits"] >= 3


# ------------------------------------------------------------------ PAB


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_pab_chains_to_the_override_below(models, family):
    """An override that was there gets every computed call, whichever node came first."""
    seen = []

    def override(func, *args, **kwargs):
        seen.append(1)
        return func(*args, **kwargs)

    def overridden(model):
        clone = model.clone()
        options = clone.model_options["transformer_options"]
        options["optimized_attention_override"] = override
        return clone

    reference = sample(models[family], family, steps=12)
    for patched in (
        cached(overridden(models[family]), "pab"),
        overridden(cached(models[family], "pab")),
    ):
        seen.clear()
        out = sample(patched, family, steps=12)
        found = section(patched)
        assert len(seen) == found["blocks_computed"]
        assert found["blocks_skipped"] > 0.15 * len(seen)
        assert relerr(reference, out) < 0.05


def test_pab_stays_within_its_budget(models):
    one = 2 * 128 * 128 * 4  # an attention output of tiny Wan, cond and uncond
    patched = cached(models["wan"], "pab", memory_budget_bytes=5 * one)
    sample(patched, "wan", steps=12)
    assert section(patched)["peak_bytes"] <= 5 * one
    assert section(patched)["blocks_skipped"] > 0
    assert any("pab keeps 5 of 20 attention outputs" in note for note in notes(patched))


# ------------------------------------------------------------------ torch.compile


def compiled(model, keys):
    """core's set_torch_compile_wrapper with a backend that counts graphs and their calls."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    counts = {"graphs": 0, "calls": 0}

    def backend(graph, example):
        counts["graphs"] += 1

        def run(*args):
            counts["calls"] += 1
            return graph.forward(*args)

        return run

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend, keys=keys)
    return clone, counts


def test_per_block_compile_does_not_recompile(models):
    torch._dynamo.reset()
    keys = [f"diffusion_model.blocks.{i}" for i in range(10)]
    reference = sample(models["wan"], "wan", steps=12)
    plain, counts = compiled(models["wan"], keys)
    sample(plain, "wan", steps=12)
    expected = dict(counts)

    torch._dynamo.reset()
    model, counts = compiled(models["wan"], keys)
    patched = cached(model)
    out = sample(patched, "wan", steps=12)
    assert section(patched)["hits"] >= 5
    assert counts["graphs"] == expected["graphs"]
    assert counts["calls"] < 0.7 * expected["calls"], "skipped blocks do not run their graphs"
    assert relerr(reference, out) < 0.05
    sample(patched, "wan", steps=12)
    assert counts["graphs"] == expected["graphs"], "the second run compiled again"
    assert is_clean(models["wan"])
    torch._dynamo.reset()


def test_cache_node_before_the_compile_node_is_the_same(models):
    torch._dynamo.reset()
    keys = [f"diffusion_model.blocks.{i}" for i in range(10)]
    patched, counts = compiled(cached(models["wan"]), keys)
    sample(patched, "wan", steps=12)
    graphs = counts["graphs"]
    assert section(patched)["hits"] >= 5
    sample(patched, "wan", steps=12)
    assert counts["graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["compile first", "cache first"])
def test_whole_model_compile(models, order):
    torch._dynamo.reset()

    def both(strategy):
        if order == "compile first":
            return cached(compiled(models["wan"], ["diffusion_model"])[0], strategy)
        return compiled(cached(models["wan"], strategy), ["diffusion_model"])[0]

    for strategy in ("cache-dit", "pab"):
        with pytest.raises(ValueError, match=f"^{strategy} works between or inside the blocks"):
            sample(both(strategy), "wan", steps=8)
    reference = sample(models["wan"], "wan", steps=12)
    patched = both("auto")
    out = sample(patched, "wan", steps=12)
    found = section(patched)
    assert found["strategy"] == "output"
    assert found["hits"] > 0
    assert relerr(reference, out) < 0.2
    assert any("torch.compile made it one graph" in note for note in notes(patched))
    torch._dynamo.reset()


# ------------------------------------------------------------------ other caches, other techniques


def refused(model, family="flux"):
    calls = []
    handle = network(model).register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ConflictError) as error:
        sample(model, family, steps=8)
    handle.remove()
    assert calls == []
    return str(error.value)


def test_other_caches_on_the_model_are_refused_before_sampling(models):
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    flux = models["flux"]
    easy = EasyCacheNode.execute(flux, 0.2, 0.15, 0.95, False).args[0]
    lazy = LazyCacheNode.execute(flux, 0.2, 0.15, 0.95, False).args[0]
    sentence = "Slipstream Cache and {} both skip steps: remove one of them."
    assert refused(cached(easy)) == sentence.format("EasyCache")
    assert refused(cached(lazy)) == sentence.format("LazyCache")
    after = EasyCacheNode.execute(cached(flux), 0.2, 0.15, 0.95, False).args[0]
    assert refused(after) == sentence.format("EasyCache")
    for key, name in (("rel_l1_thresh", "TeaCache"), ("cache_dit_turbo", "another pack's cache")):
        other = flux.clone()
        other.model_options["transformer_options"][key] = 0.4
        assert refused(cached(other)) == sentence.format(name)


def test_a_wrapper_function_of_another_pack_is_recognised_by_its_name(models):
    def model_unet_function_wrapper(function, kwargs):
        return function(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    model_unet_function_wrapper.__module__ = "custom_nodes.Comfy-WaveSpeed.fbcache_nodes"
    other = models["flux"].clone()
    other.set_model_unet_function_wrapper(model_unet_function_wrapper)
    assert "another pack's cache" in refused(cached(other))
    model_unet_function_wrapper.__module__ = "custom_nodes.some_upscaler"
    sample(cached(other), "flux", steps=8)


@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_can_ask_which_blocks_will_run(models, order):
    """A hook under ours (offload's place): never called for skipped blocks, and told so before."""
    base = cache_models.load("wan")
    log = []

    def offload(executor, *args, **kwargs):
        from slipstream.backends.forwards import overridden

        call = args[-1][CALL] if CALL in args[-1] else kwargs["transformer_options"][CALL]
        entries = []

        def hook(i, forward):
            def run(*a, **k):
                entries.append((i, tuple(call.next_blocks(i))))
                return forward(*a, **k)

            return run

        blocks_ = list(executor.class_obj.blocks)
        with overridden([(b, hook(i, b.forward)) for i, b in enumerate(blocks_)]):
            out = executor(*args, **kwargs)
        log.append(entries)
        return out

    key = "slipstream.offload"
    if order == "before":
        base.add_wrapper_with_key("diffusion_model", key, offload)
    patched = cached(base, "cache-dit", residual_diff_threshold=0.3)
    if order == "after":
        patched.add_wrapper_with_key("diffusion_model", key, offload)
    sample(patched, "wan", steps=12)
    decisions = section(patched)["decisions"]
    assert len(decisions) == len(log) == 12
    for decision, entries in zip(decisions, log, strict=True):
        ran = [i for i, _ in entries]
        assert ran == ([0] if decision["reused"] else list(range(10)))
        if decision["reason"] in ("first", "warmup", "cooldown"):
            assert entries[0][1] == tuple(range(1, 10)), "known before block 0 runs"
    assert any(decision["reused"] for decision in decisions)


def test_a_mask_is_known_before_the_first_block(models):
    patched = cached(models["wan"], "scm")
    known = []

    def watch(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        call = next(a[CALL] for a in args if isinstance(a, dict) and CALL in a)
        known.append((call.num_blocks, len(call.skipped_blocks)))
        return out

    patched.add_wrapper_with_key("diffusion_model", "test.watch", watch)
    sample(patched, "wan", steps=12)
    reused = [d["reused"] for d in section(patched)["decisions"]]
    assert known == [(10, 10 if r else 0) for r in reused]
    assert any(reused)


@pytest.mark.parametrize("strategy", ["cache-dit", "scm", "output", "deepcache"])
def test_a_decision_can_come_from_outside(models, strategy):
    """Rank 0 decides: another process with other local metrics does what it is told."""
    family = "sd15" if strategy == "deepcache" else "flux"
    model = tiny.load(family) if family == "sd15" else models[family]
    told = {}

    def rank_0(call, reuse):
        told[call.evaluation, call.key.occurrence, call.cond_or_uncond] = reuse
        return reuse

    def rank_1(call, reuse):
        return told[call.evaluation, call.key.occurrence, call.cond_or_uncond]

    settings = {"residual_diff_threshold": 0.12, "warmup": 2}
    first = cached(model, strategy, decider=rank_0, **settings)
    sample(first, family, steps=8)
    other = cached(model, strategy, decider=rank_1, **{**settings, "residual_diff_threshold": 0.9})
    sample(other, family, steps=8, seed=9)
    logs = [[d["reused"] for d in section(m)["decisions"]] for m in (first, other)]
    assert logs[0] == logs[1]
    assert any(logs[0])


def test_applied_twice_the_later_one_replaces_the_earlier(models):
    once = cached(models["flux"], "scm")
    twice = cached(cached(models["flux"], "output"), "scm")
    assert equal(sample(once, "flux", steps=8), sample(twice, "flux", steps=8))
    wrappers = twice.wrappers["diffusion_model"]["slipstream.cache"]
    assert len(wrappers) == 1


def test_the_input_of_the_node_is_not_written_to(models):
    model = cached(models["flux"], "scm")
    before = (
        {kind: dict(by_key) for kind, by_key in model.wrappers.items()},
        dict(model.model_options["transformer_options"]["slipstream"]),
    )
    apply_cache(model, CacheConfig(strategy="output"))
    after = (
        {kind: dict(by_key) for kind, by_key in model.wrappers.items()},
        dict(model.model_options["transformer_options"]["slipstream"]),
    )
    assert before == after


def test_lora_weights_compose(models):
    """A patched weight changes what is computed, not how it is cached."""
    clone = models["flux"].clone()
    weight = network(clone).single_blocks[2].linear1.weight
    up, down = torch.randn(weight.shape[0], 2) * 0.05, torch.randn(2, weight.shape[1]) * 0.05
    from comfy.weight_adapter import LoRAAdapter

    key = "diffusion_model.single_blocks.2.linear1.weight"
    adapter = LoRAAdapter(set(), (up, down, 2.0, None, None, None))
    assert clone.add_patches({key: adapter}, 1.0) == [key]
    reference = sample(clone, "flux")
    assert not equal(reference, sample(models["flux"], "flux"))
    clone2 = cached(clone)
    assert relerr(reference, sample(clone2, "flux")) < 0.05
    assert section(clone2)["hits"] >= 10
