"""SlipstreamAttention on ComfyUI's own models, samplers and patches, on a CPU."""

import itertools

import fake_kernels
import pytest
import tiny
import torch
from fake_kernels import FakeKernel
from slipstream.backends import architectures
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig, AttentionError
from slipstream.backends.run import run_log

FAMILIES = (*tiny.FAMILIES, *tiny.IN_MEMORY)
OPEN = {"min_tokens": 0, "dense_first_steps": 0, "dense_last_steps": 0, "autotune": False}

pytestmark = pytest.mark.usefixtures("comfy")


def flat(samples):
    parts = samples.unbind() if getattr(samples, "is_nested", False) else (samples,)
    return torch.cat([part.float().flatten() for part in parts])


def relative(a, b):
    a, b = flat(a), flat(b)
    return ((a - b).abs().max() / b.abs().max()).item()


def section(model):
    return run_log(model).latest().to_json()["attention"]


def manual_math(model, **settings):
    return apply_attention(model, AttentionConfig(policy="manual", backend="math", **settings))


def patched(kernel, model, **settings):
    known, policies = fake_kernels.table(kernel)
    config = AttentionConfig(**{**OPEN, **settings})
    return apply_attention(model, config, kernels=known, policies=policies)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_no_node_for_every_architecture(family):
    model = tiny.load(family)
    plain = tiny.sample(model, family)
    exact = tiny.sample(apply_attention(model, AttentionConfig(policy="exact")), family)
    assert torch.equal(flat(exact), flat(plain))
    ours = manual_math(model, dense_first_steps=0, dense_last_steps=0, min_tokens=0)
    assert relative(tiny.sample(ours, family), plain) <= 1e-6 or section(ours)["calls"] == {}
    found = section(ours)
    if found["calls"]:
        assert set(found["calls"]) == {"math"}, found["reasons"]
    else:
        assert any("does not pass through" in sentence for sentence in found["reasons"])
    assert torch.equal(flat(tiny.sample(model, family)), flat(plain))
    strict = apply_attention(model, AttentionConfig(policy="exact", strict=True))
    if found["calls"]:
        with pytest.raises(AttentionError, match="need a CUDA or ROCm GPU"):
            tiny.sample(strict, family)


def test_models_that_are_not_reached_are_those_the_architectures_name():
    named, silent = set(), set()
    for family in FAMILIES:
        model = tiny.load(family)
        known = architectures.find(model.model.diffusion_model)
        if known is not None and not known.notes.reaches_override:
            named.add(family)
        noded = manual_math(model)
        tiny.sample(noded, family, steps=1, cfg=1.0)
        if not section(noded)["calls"]:
            silent.add(family)
    assert silent == named
    assert "ernie" in silent


@pytest.mark.parametrize("family", ["flux", "wan", "sd15", "sd3", "ltxv"])
@pytest.mark.parametrize(("cfg", "split"), [(1.0, False), (4.0, False), (4.0, True)])
def test_cfg_and_prompts_of_different_length(family, cfg, split):
    model = tiny.load(family)
    plain = tiny.sample(model, family, cfg=cfg, split=split)
    ours = manual_math(model)
    assert relative(tiny.sample(ours, family, cfg=cfg, split=split), plain) <= 1e-6
    assert sum(section(ours)["calls"].values()) > 0


def test_schedule_for_all_sampler_names():
    """dense_first_steps and dense_last_steps are right for every sampler, by sigma, not by call."""
    import comfy.samplers

    model = tiny.load("wan")
    wrong = {}
    for name in comfy.samplers.SAMPLER_NAMES:
        kernel = FakeKernel("quick")
        noded = patched(kernel, model, dense_first_steps=1, dense_last_steps=1, probe=False)
        tiny.sample(noded, "wan", steps=5, cfg=1.0, sampler=name)
        grid = run_log(noded).latest().sections["attention"].figures[0]
        steps = [set(column) - {None} for column in zip(*grid.cells, strict=True)]
        middle = set().union(*steps[1:-1])
        if "quick" in steps[0] | steps[-1] or "quick" not in middle:
            wrong[name] = steps
    assert wrong == {}


def test_lora_before_and_after():
    """A weight patch through ComfyUI's own add_patches, on either side of the node."""
    model = tiny.load("flux")
    weight = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.02
    patch = {"diffusion_model.double_blocks.0.img_attn.qkv.weight": (delta,)}

    def lora(m):
        m = m.clone()
        assert m.add_patches(patch, 1.0)
        return m

    plain, with_lora = tiny.sample(model, "flux"), tiny.sample(lora(model), "flux")
    assert relative(plain, with_lora) > 1e-3
    before = tiny.sample(manual_math(lora(model)), "flux")
    after = tiny.sample(lora(manual_math(model)), "flux")
    assert relative(before, with_lora) <= 1e-6
    assert relative(after, with_lora) <= 1e-6
    assert torch.equal(tiny.sample(model, "flux"), plain)


def test_report_is_found_behind_a_later_lora_node():
    model = manual_math(tiny.load("flux"))
    later = model.clone()
    out = tiny.sample(later, "flux")
    assert run_log(model).of_latent(out) is run_log(later).latest()


def test_sampler_custom_advanced_with_cfg_guider():
    from comfy_extras.nodes_custom_sampler import (
        CFGGuider,
        KSamplerSelect,
        RandomNoise,
        SamplerCustomAdvanced,
        SplitSigmas,
    )

    model = tiny.load("wan")
    import comfy.samplers

    def run(m):
        guider = CFGGuider.execute(m, tiny.text("wan", seed=1), tiny.text("wan", seed=2), 3.0)[0]
        sampler = KSamplerSelect.execute("euler")[0]
        noise = RandomNoise.execute(5)[0]
        sampling = m.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
        high, low = SplitSigmas.execute(sigmas, 2)[:2]
        latent = {"samples": tiny.latent("wan")}
        first = SamplerCustomAdvanced.execute(noise, guider, sampler, high, latent)[0]
        return SamplerCustomAdvanced.execute(noise, guider, sampler, low, first)[0]["samples"]

    ours = manual_math(model)
    assert relative(run(ours), run(model)) <= 1e-6
    assert [r.num_steps for r in run_log(ours).records] == [2, 2]


def test_chained_with_core_attention_backend_in_either_order():
    from comfy_extras.nodes_model_advanced import ModelAttentionBackend

    model = tiny.load("flux")
    plain = tiny.sample(model, "flux")
    core = ModelAttentionBackend().patch
    first = manual_math(core(model, "pytorch attention")[0])
    assert relative(tiny.sample(first, "flux"), plain) <= 1e-6
    assert section(first)["calls"].keys() == {"math"}
    # Core's node with torch's function is exact: nothing is computed twice to be safe.
    refusing = patched(FakeKernel("no", refuse="never"), core(model, "pytorch attention")[0])
    tiny.sample(refusing, "flux")
    assert section(refusing)["label"] == "exact"
    assert section(refusing)["calls"].keys() == {"comfyui:pytorch"}
    last = core(manual_math(model), "pytorch attention")[0]  # core's node overwrites the hook
    assert torch.equal(tiny.sample(last, "flux"), plain)
    (reason,) = [s for s in section(last)["reasons"] if "put Slipstream Attention behind" in s]
    assert "set_model_optimized_attention" in reason


def test_override_that_reinstalls_itself_every_step_does_not_grow():
    """As core's sparse attention does at ON_PREPARE_STATE: on top of ours, every evaluation."""
    from comfy.patcher_extension import CallbacksMP

    depths = []

    def on_top(patcher, timestep, model_options):
        options = model_options["transformer_options"]
        below = options["optimized_attention_override"]
        below = getattr(below, "below", below)

        def override(func, *args, **kwargs):
            return below(func, *args, **kwargs)

        override.below = below
        options["optimized_attention_override"] = override
        depth, link = 0, override
        while link is not None:
            depth, link = depth + 1, getattr(link, "below", getattr(link, "previous", None))
        depths.append(depth)

    kernel = FakeKernel("quick")
    model = patched(kernel, tiny.load("wan"))
    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "sparse", on_top)
    tiny.sample(model, "wan", steps=4, cfg=1.0)
    assert depths == [2, 2, 2, 2]
    assert set(section(model)["calls"]) == {"quick"}


def test_real_torch_compile_node_keeps_the_schedule():
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    model = tiny.load("wan")
    plain = tiny.sample(model, "wan", steps=4, cfg=1.0)
    kernel = FakeKernel("quick")
    noded = patched(kernel, model, dense_first_steps=1, dense_last_steps=1)
    compiled = noded.clone()
    set_torch_compile_wrapper(
        compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict}
    )
    for _ in range(2):
        out = tiny.sample(compiled, "wan", steps=4, cfg=1.0)
        assert relative(out, plain) <= 1e-5
        found = section(compiled)["calls"]
        assert found == {"comfyui:pytorch": 16, "quick": 16}
    torch._dynamo.reset()


def test_denoise_range_of_ksampler_advanced():
    """KSamplerAdvanced: two halves of one schedule, each a run of its own."""
    import comfy.sample

    model = tiny.load("flux")

    def run(m):
        latent = tiny.latent("flux")
        noise = comfy.sample.prepare_noise(latent, 1)
        for start, end in ((0, 3), (3, 6)):
            latent = comfy.sample.sample(
                m, noise, 6, 1.0, "euler", "simple", tiny.text("flux"), tiny.text("flux", seed=2),
                latent, start_step=start, last_step=end, force_full_denoise=end == 6,
                disable_noise=start > 0, disable_pbar=True, seed=1,
            )  # fmt: skip
            noise = torch.zeros_like(latent)
        return latent

    ours = manual_math(model)
    assert relative(run(ours), run(model)) <= 1e-6
    assert [r.num_steps for r in run_log(ours).records] == [3, 3]


def open_to_all(kernel, model, **settings):
    """As `patched`, with the node's own schedule."""
    automatic = {"dense_first_steps": -1, "dense_last_steps": -1}
    return patched(kernel, model, probe=False, **{**automatic, **settings})


def in_parts(model, num_steps, *bounds):
    """KSamplerAdvanced: one schedule, a sampler for each part of it."""
    import comfy.sample

    latent = tiny.latent("wan")
    noise = comfy.sample.prepare_noise(latent, 1)
    for start, end in itertools.pairwise(bounds):
        latent = comfy.sample.sample(
            model, noise, num_steps, 1.0, "euler", "simple", tiny.text("wan"),
            tiny.text("wan", seed=2), latent, start_step=start, last_step=end,
            force_full_denoise=end == num_steps, disable_noise=start > 0, disable_pbar=True, seed=1,
        )  # fmt: skip
        noise = torch.zeros_like(latent)
    return latent


@pytest.mark.parametrize(
    ("num_steps", "bounds", "dense"),
    [
        (4, (0, 4), [[]]),
        (4, (0, 2, 4), [[], []]),
        (8, (0, 4, 8), [[], []]),
        (20, (0, 20), [[0, 19]]),
        (20, (0, 10, 20), [[0], [9]]),
    ],
)
def test_few_steps_are_open_and_a_split_schedule_has_one_start_and_one_end(
    num_steps, bounds, dense
):
    """Wan 2.2 with a 4-step LoRA is two runs of two steps: its commonest use."""
    model = open_to_all(FakeKernel("quick"), tiny.load("wan"))
    in_parts(model, num_steps, *bounds)
    found = []
    for record in run_log(model).records:
        grid = record.sections["attention"].figures[0]
        columns = [set(column) - {None} for column in zip(*grid.cells, strict=True)]
        found.append([i for i, kernels in enumerate(columns) if kernels != {"quick"}])
    assert found == dense


UNNAMED = ("ltxv", "sd3", "minimax", "aura", "cosmos_predict2")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(UNNAMED)])
def test_blocks_that_comfyui_does_not_name_are_named_by_the_architecture(family):
    """dense_blocks means the same block in every family, whether a cache skips blocks or not."""
    model = tiny.load(family)
    architecture = architectures.find(model.model.diffusion_model)
    last = len(architectures.stack_blocks(model.model.diffusion_model, architecture.stacks[0])) - 1
    kernel = FakeKernel("quick", error=1e-4)
    noded = patched(kernel, model, dense_blocks=str(last))
    tiny.sample(noded, family, steps=2, cfg=1.0)
    layers = section(noded)["layers"]
    inside = [x for x in layers if not x["block"].startswith("call/")]
    names = {x["block"].split("/")[0] for x in inside}
    known = {s.block_type for s in (*architecture.stacks, *architecture.side)}
    assert names, layers
    assert names <= known
    first = architecture.stacks[0].block_type
    exact = {x["block"].split(".")[0] for x in inside if "quick" not in x["kernels"]}
    assert exact == {f"{first}/{last}"}


def test_side_blocks_are_no_calls_of_the_main_block_before_them():
    """VACE's control blocks run with the ids of a main block still in the options."""
    model = tiny.load("wan_vace")
    noded = patched(FakeKernel("quick"), model)
    tiny.sample(noded, "wan_vace", steps=2, cfg=1.0)
    blocks = [layer["block"] for layer in section(noded)["layers"]]
    (side,) = architectures.find(model.model.diffusion_model).side
    assert any(block.startswith(f"{side.block_type}/") for block in blocks)
    assert not any(block.endswith((".2", ".3")) for block in blocks)  # self and cross, no more


def test_a_cache_does_not_make_every_call_of_an_unnamed_block_new(monkeypatch):
    from slipstream.backends.attention import plan
    from slipstream.backends.cache.apply import apply_cache
    from slipstream.backends.cache.config import CacheConfig

    seen, real = [], plan.probe
    monkeypatch.setattr(plan, "probe", lambda *a, **k: seen.append(0) or real(*a, **k))
    counts = {}
    for cached in (False, True):
        kernel = FakeKernel("quick", error=1e-4)
        noded = patched(kernel, tiny.load("ltxv"))
        if cached:
            config = CacheConfig(strategy="cache-dit", front_blocks=1, warmup=1)
            noded = apply_cache(noded, config)
        seen.clear()
        tiny.sample(noded, "ltxv", steps=6, cfg=1.0)
        counts[cached] = len(seen)
    assert 0 < counts[True] <= counts[False]  # a layer that is skipped is not checked
