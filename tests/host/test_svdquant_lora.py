"""LoRA and its relatives on quantised layers, against ComfyUI's own merge into the dense model."""

import comfy_home
import pytest
import svdquant_models
import tiny
import torch
from slipstream.backends import run as runs
from slipstream.backends.conflicts import ConflictError
from slipstream.backends.svdquant.host import load_svdquant
from svdquant_loras import LAYERS, WHOLE, H, lora_file, with_lora
from svdquant_networks import CPU, flux_output, loaded_flux_output, rel

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = {"depth": 1, "single": 1, "context": 768, "vec": 768}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "flux.safetensors"
    return path, svdquant_models.write(path, "flux", "nunchaku-1", **FLUX)


@pytest.fixture(scope="module")
def dense(flux):
    import comfy.sd

    comfy_home.in_process()
    state = {k: v.clone() for k, v in flux[1].items()}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def exact(flux):
    return load_svdquant(str(flux[0]), {"backend": "dequant", "dtype": "fp32"})


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


KINDS = ("lora", "dora", "dora-columns", "loha", "loha-wide", "lokr", "diff")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_merge_into_the_dense_model(kind, dense, exact):
    layers = LAYERS if kind in ("lora", "diff") else WHOLE  # DoRA and LyCORIS of whole layers
    file = lora_file(kind, layers)
    base_dense, base = loaded_flux_output(dense), loaded_flux_output(exact)
    delta = loaded_flux_output(with_lora(dense, file, 0.8)) - base_dense
    got = loaded_flux_output(with_lora(exact, file, 0.8)) - base
    assert delta.norm() > 0.01 * base_dense.norm()
    assert rel(got, delta) < 2e-4
    assert torch.equal(loaded_flux_output(exact), base)  # taken off again, bit for bit


def test_lora_on_layers_that_compute_in_fp32_from_16_bits(flux, dense):
    """As on cards without bf16; here on the CPU, where ComfyUI computes in fp32."""
    model = load_svdquant(str(flux[0]), {"backend": "dequant"})
    assert model.model.get_dtype_inference() == torch.float32
    assert model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.dtype == torch.bfloat16
    file = lora_file("lora", LAYERS[:-1])  # ComfyUI rounds its merge into the dense one
    base_dense, base = loaded_flux_output(dense), loaded_flux_output(model)
    assert rel(base, base_dense) < 1e-3  # only what the file holds is in 16 bits
    delta = loaded_flux_output(with_lora(dense, file, 0.8)) - base_dense
    patched = with_lora(model, file, 0.8)
    got = loaded_flux_output(patched)
    assert rel(got - base, delta) < 1e-2  # its factors rest in 16 bits
    low = patched.clone()
    low.unpatch_model(CPU)
    low.load(CPU, lowvram_model_memory=0)
    assert low.model.model_lowvram
    assert torch.equal(flux_output(low), got)


def test_several_loras_and_strengths_add_up(dense, exact):
    a, b = lora_file("lora"), lora_file("lokr", WHOLE, seed=1)
    c = lora_file("dora", WHOLE, seed=2)
    chain = [(a, 0.7), (b, -0.4), (c, 0.5), (a, 0.2)]

    def patched(model):
        for file, strength in chain:
            model = with_lora(model, file, strength)
        return loaded_flux_output(model)

    delta = patched(dense) - loaded_flux_output(dense)
    base = loaded_flux_output(exact)
    assert rel(patched(exact) - base, delta) < 3e-4
    once = loaded_flux_output(with_lora(with_lora(exact, a, 0.5), a, 0.5))
    assert rel(once, loaded_flux_output(with_lora(exact, a, 1.0))) < 1e-5
    assert torch.equal(loaded_flux_output(with_lora(exact, a, 0.0)), base)


@pytest.mark.parametrize("backend", ["kitchen", "dequant"])
def test_delta_in_16_bits_points_the_same_way(backend, flux, dense):
    """Per layer for any backend; through the whole network where inputs stay 16-bit."""
    file = lora_file("lora")
    model = load_svdquant(str(flux[0]), {"backend": backend})
    delta = loaded_flux_output(with_lora(dense, file)) - loaded_flux_output(dense)
    base = loaded_flux_output(model)
    got = loaded_flux_output(with_lora(model, file)) - base
    if backend == "dequant":
        assert cosine(got, delta) > 0.98
    patched = with_lora(model, file)
    loaded_flux_output(patched)
    name = "single_blocks.0.linear2"
    layer = patched.model.diffusion_model.get_submodule(name)
    down = file["transformer.single_transformer_blocks.0.proj_out.lora_A.weight"]
    up = file["transformer.single_transformer_blocks.0.proj_out.lora_B.weight"]
    x = torch.randn(64, 5 * H, generator=torch.Generator().manual_seed(1))
    x[:, H:] = torch.nn.functional.gelu(x[:, H:], approximate="tanh")
    with_it = layer(x)
    layer.lora_patches, saved = [], layer.lora_patches
    without = layer(x)
    layer.lora_patches = saved
    assert cosine(with_it - without, (x @ down.t()) @ up.t() * 1.5) > 0.98
    loaded_flux_output(model)
    assert torch.equal(loaded_flux_output(model), base)


def test_low_vram_paths_apply_it_once(flux):
    model = load_svdquant(str(flux[0]), {"backend": "dequant", "dtype": "fp32"})
    patched = with_lora(model, lora_file("lora"))
    wanted = loaded_flux_output(patched)
    low = patched.clone()
    low.unpatch_model(CPU)
    low.load(CPU, lowvram_model_memory=0)
    assert low.model.model_lowvram
    assert torch.equal(flux_output(low), wanted)
    low.unpatch_model(CPU)
    low.load(CPU, full_load=True)
    low.partially_unload(CPU, memory_to_free=1 << 40)  # layers keep full-load patches as well
    assert torch.equal(flux_output(low), wanted)
    low.unpatch_model(CPU)
    assert torch.equal(loaded_flux_output(model), loaded_flux_output(model.clone()))
    assert rel(loaded_flux_output(model), wanted) > 0.01


def test_a_stock_patcher_would_lose_it(flux, dense):
    """The negative control: without our patcher class the LoRA does nothing on 4-bit layers."""
    import comfy.model_patcher

    model = load_svdquant(str(flux[0]), {"backend": "dequant", "dtype": "fp32"})
    base = loaded_flux_output(model)
    model.__class__ = comfy.model_patcher.ModelPatcher
    file = {k: v for k, v in lora_file("lora").items() if "x_embedder" not in k}
    lost = with_lora(model, file)
    try:
        out = loaded_flux_output(lost)
    except ValueError:
        return  # refused aloud is as good a control
    assert torch.equal(out, base)


def test_hook_loras_come_and_go(dense, exact):
    import comfy.hooks
    import comfy.lora

    file = lora_file("lora")

    def hooked(model):
        clone = model.clone()
        hook = comfy.hooks.WeightHook(strength_model=0.8)
        keys = comfy.lora.model_lora_keys_unet(clone.model, {})
        hook.weights = comfy.lora.load_lora(dict(file), keys)
        group = comfy.hooks.HookGroup()
        group.add(hook)
        clone.add_hook_patches(hook, hook.weights, hook.strength)
        loaded_flux_output(clone)
        clone.patch_hooks(group)
        on = flux_output(clone)
        clone.patch_hooks(None)
        return on, flux_output(clone)

    on_dense, off_dense = hooked(dense)
    on, off = hooked(exact)
    assert rel(on - off, on_dense - off_dense) < 2e-3
    assert torch.equal(off, loaded_flux_output(exact))


def test_bypass_lora_works_beside_it(dense, exact):
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    file = {k: v for k, v in lora_file("lora", WHOLE).items() if "linear" not in k}

    def bypass(model):
        return comfy.sd.load_bypass_lora_for_models(model, None, dict(file), 0.8, 0)[0]

    delta = loaded_flux_output(bypass(dense)) - loaded_flux_output(dense)
    base = loaded_flux_output(exact)
    assert rel(loaded_flux_output(bypass(exact)) - base, delta) < 1e-3


def sample(model):
    return tiny.sample(model, "flux", steps=2)


def test_report_counts_layers_and_names_what_was_refused(exact):
    file = lora_file("lora")
    patched = with_lora(with_lora(exact, file), lora_file("glora", WHOLE[:2]))
    base = sample(with_lora(exact, file))
    out = sample(patched)
    record = runs.run_log(patched).latest()
    section = record.to_json()["svdquant"]
    # img qkv (to_q and to_v), mlp.2, proj, mod.lin, linear1 (to_k and proj_mlp), linear2
    assert section["lora_layers"] == 6
    text = section["reasons"]["lora: glora"]
    assert text.startswith("LoRA type 'glora' is not supported on quantised layers")
    assert "double_blocks.0.img_mlp.2" in text
    assert text in record.notes
    assert torch.equal(out, base)  # the rest applied


def test_a_model_merge_is_refused_before_sampling(flux, exact, dense):
    merged = exact.clone()
    keys = dense.get_key_patches("diffusion_model.")
    name = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    merged.add_patches({name: keys[name]}, 0.5, 0.5)
    with pytest.raises(ConflictError, match="model merge scales the weights"):
        sample(merged)
    allowed = exact.clone()
    name = "diffusion_model.img_in.weight"  # not quantised: merging it is fine
    allowed.add_patches({name: keys[name]}, 0.5, 0.5)
    assert torch.isfinite(sample(allowed)).all()
    # and the other way round: a quantised model cannot be merged into a dense one
    target = dense.clone()
    quantised = exact.get_key_patches("diffusion_model.")
    name = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    target.add_patches({name: quantised[name]}, 0.5, 0.5)
    with pytest.raises(ValueError, match="stay 4-bit"):
        loaded_flux_output(target)


def test_terms_are_compiled_once_per_run(exact, monkeypatch):
    from slipstream.backends.svdquant import host_operations

    calls = []
    real = host_operations.compile_terms
    monkeypatch.setattr(
        host_operations, "compile_terms", lambda *args: calls.append(1) or real(*args)
    )
    patched = with_lora(exact, lora_file("lora"))
    sample(patched)
    assert len(calls) == 6  # layers, whatever the number of steps and calls
    sample(patched)
    assert len(calls) == 12  # nothing was kept between runs
