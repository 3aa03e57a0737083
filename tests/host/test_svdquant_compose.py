"""SVDQuant under every other technique, and with ComfyUI's own patches, on one MODEL."""

import pytest
import svdquant_models
import tiny
import torch
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.run import run_log
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig
from svdquant_loras import lora_file, with_lora

pytestmark = pytest.mark.usefixtures("comfy")
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def no_workers_left():
    yield
    pool().close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("compose") / "flux.safetensors"
    svdquant_models.write(file, "flux", "nunchaku-1", depth=1, single=1, context=768, vec=768)
    return str(file)


@pytest.fixture(scope="module")
def model(path):
    return load_svdquant(path, {"backend": "dequant", "dtype": "fp32"})


def sample(model, **kwargs):
    return tiny.sample(model, "flux", steps=STEPS, **kwargs)


def section(model, name="svdquant"):
    return run_log(model).latest().to_json()[name]


def rel(a, b):
    return float((a - b).norm() / b.norm())


def attention(model):
    config = AttentionConfig(policy="manual", backend="math", min_tokens=0)
    return apply_attention(model, config)


def offload(model):
    return apply_offload(model, OffloadConfig())


@pytest.mark.parametrize("apply", [attention, offload], ids=["attention", "offload"])
def test_output_preserving_techniques(apply, model):
    plain = sample(model)
    for lora in (False, True):
        base = with_lora(model, lora_file("lora")) if lora else model
        wanted = sample(base) if lora else plain
        patched = apply(base)
        assert rel(sample(patched), wanted) < 2e-6
        assert section(patched)["backend"] == "dequant"
    assert torch.equal(sample(model), plain)


def test_cache_skips_steps_of_a_4_bit_model(model):
    config = CacheConfig.from_ratio(0.9, strategy="scm", engine="builtin")
    cached = apply_cache(model, config.with_(front_blocks=1))
    plain, out = sample(model), sample(cached)
    assert torch.isfinite(out).all()
    assert section(cached)["layers"] == section(model)["layers"]
    assert rel(out, plain) < 1.0
    assert torch.equal(sample(model), plain)


def distributed(model):
    parallel = section(model, "parallel")
    assert parallel["calls_distributed"] > 0, parallel["reasons"]


@pytest.mark.parametrize("lora", [False, True])
def test_sequence_parallel_workers_load_the_file_themselves(lora, model):
    base = with_lora(model, lora_file("lora")) if lora else model
    wanted = sample(base)
    config = SequenceParallelConfig(workers=2, devices="cpu,cpu")
    shared = apply_parallel(base, config)
    assert rel(sample(shared), wanted) < 5e-6
    distributed(shared)


def test_kitchen_under_sequence_parallel(path):
    """4-bit inputs are rounded per token, so a shard rounds its tokens alike."""
    model = load_svdquant(path, {"backend": "kitchen"})
    wanted = sample(model)
    shared = apply_parallel(model, SequenceParallelConfig(workers=2, devices="cpu,cpu"))
    assert rel(sample(shared), wanted) < 2e-2
    distributed(shared)


def test_patches_replace_sees_the_blocks(model):
    calls = []

    def replace(args, extra):
        calls.append(1)
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(replace, "dit", "double_block", 0)
    assert torch.equal(sample(patched), sample(model))
    assert calls


def test_a_block_compiles(model):
    """Layers are a graph break; the code around them is compiled and the result is the same."""
    x = torch.randn(1, 16, 8, 8)
    kwargs = {
        "context": torch.randn(1, 5, 768),
        "y": torch.randn(1, 768),
        "guidance": torch.tensor([3.5]),
    }
    sample(model)
    network = model.model.diffusion_model
    with torch.no_grad():
        wanted = network(x, torch.tensor([0.5]), **kwargs)
        compiled = torch.compile(network, backend="eager")
        got = compiled(x, torch.tensor([0.5]), **kwargs)
        again = compiled(x, torch.tensor([0.5]), **kwargs)
    assert rel(got, wanted) < 1e-5
    assert torch.equal(got, again)


def test_calibrate_refuses_and_records(tmp_path, model):
    from slipstream.backends.svdquant.calibrate import apply_calibrate
    from slipstream.backends.svdquant.statistics import load_statistics

    with pytest.raises(ValueError, match="4-bit already: calibrate the 16-bit model"):
        apply_calibrate(model, tmp_path / "a.safetensors")
    known = r"knows FLUX\.1, Qwen-Image, Z-Image, SDXL; this model is"
    with pytest.raises(ValueError, match=known):
        apply_calibrate(tiny.load("wan"), tmp_path / "a.safetensors")
    dense = tiny.load("flux")
    wanted = sample(dense)
    file = tmp_path / "flux.safetensors"
    recorder = apply_calibrate(dense, file)
    assert torch.equal(sample(recorder), wanted)
    assert section(recorder, "svdquant_calibrate") == {
        "layers": 2 * 8 + 3 * 2,
        "file": "flux.safetensors",
        "runs": 1,
    }
    sample(recorder, seed=2)
    known = load_statistics(file)
    assert known.num_runs == 2
    assert known.layers["single_blocks.0.linear2"].absmax.shape == (640,)
    assert known.layers["double_blocks.0.img_mlp.2"].absmax.min() >= 0
    modules = dict(dense.model.diffusion_model.named_modules())
    assert not any(m._forward_pre_hooks for m in modules.values())
    with pytest.raises(ValueError, match="recorded on another model"):
        apply_calibrate(tiny.load("qwen_image"), file)
    assert not quantised_layers(dense.model)


def test_calibrate_and_compile_refuse_each_other(tmp_path):
    from slipstream.backends.conflicts import ConflictError
    from slipstream.backends.svdquant.calibrate import apply_calibrate

    model = apply_calibrate(tiny.load("flux"), tmp_path / "x.safetensors")
    model.add_wrapper_with_key("apply_model", "torch.compile", lambda f, *a, **k: f(*a, **k))
    with pytest.raises(ConflictError, match="cannot see the inputs of compiled layers"):
        sample(model)
