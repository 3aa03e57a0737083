"""SVDQuant files in ComfyUI's own classes: parity with the dense model, load paths, the report."""

import functools
import json
import subprocess
import sys

import comfy_home
import pytest
import svdquant_models
import torch
from slipstream.backends import run as runs
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import BackendError, CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.layout import FrozenWeightError, unwrap, wrap
from slipstream.backends.svdquant.weight import PARTS
from svdquant_networks import (
    CPU,
    SIZES,
    dense_model,
    flux_output,
    loaded_flux_output,
    quantised_model,
    rel,
    sample,
)

pytestmark = pytest.mark.usefixtures("comfy")
# seen at most: 0.016, 0.006, 0.09, 0.019
FOUR_BIT = {"flux": 0.05, "qwen-image": 0.05, "z-image": 0.2, "sdxl": 0.05}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(path, dense state) of a family in a dialect; each is written once."""
    folder = tmp_path_factory.mktemp("svdquant")

    @functools.cache
    def file(family, dialect, precision="int4"):
        path = folder / f"{family}-{dialect}-{precision}.safetensors"
        dense = svdquant_models.write(path, family, dialect, precision=precision, **SIZES[family])
        return path, dense

    return file


DIALECTS = [
    ("flux", "nunchaku-1", "int4"),
    ("flux", "nunchaku-2", "int4"),
    ("flux", "nunchaku-lite", "int4"),
    ("flux", "comfy-kitchen", "int4"),
    ("flux", "nunchaku-1", "nvfp4"),
    ("qwen-image", "nunchaku-2", "int4"),
    ("qwen-image", "comfy-kitchen", "int4"),
    ("qwen-image", "nunchaku-2", "nvfp4"),
    ("z-image", "nunchaku-2", "int4"),
    ("z-image", "nunchaku-lite", "int4"),
    ("sdxl", "nunchaku-1", "int4"),
    ("sdxl", "nunchaku-1", "nvfp4"),
]


@pytest.mark.parametrize(("family", "dialect", "precision"), DIALECTS)
def test_samples_match_the_dense_model(family, dialect, precision, files):
    """Unpacked weights in fp32 are the dense model; 4-bit inputs cost some percent of a random
    network's output; a wrong scale in one layer is caught."""
    path, dense = files(family, dialect, precision)
    wanted = sample(dense_model(family, dense), family)
    exact = quantised_model(family, path, "dequant")
    assert rel(sample(exact, family), wanted) < 3e-6
    four_bit = rel(sample(quantised_model(family, path, "reference"), family), wanted)
    assert 1e-3 < four_bit < FOUR_BIT[family]
    layers = quantised_layers(exact.model).values()
    segments = (unwrap(m.weight).segments[0] for m in layers)
    smooth = next(segment.smooth for segment in segments if segment.smooth is not None)
    smooth.mul_(1.5)
    assert rel(sample(exact, family), wanted) > 1e-4


@pytest.mark.parametrize("family", svdquant_models.OWN)
def test_kitchen_in_16_bits_and_the_report(family, files):
    path, dense = files(family, svdquant_models.OWN[family])
    wanted = sample(dense_model(family, dense), family)
    model = quantised_model(family, path, "auto", "bf16")
    assert rel(sample(model, family), wanted) < FOUR_BIT[family]
    section = runs.run_log(model).latest().to_json()["svdquant"]
    checkpoint = detect(read_header(path))
    assert section == {
        "family": family,
        "dialect": checkpoint.dialect,
        "backend": "kitchen",
        "layers": len(quantised_layers(model.model)),
        "weight_bytes": sum(
            unwrap(m.weight).num_bytes for m in quantised_layers(model.model).values()
        ),
        "lora_layers": 0,
        "copy": "",
        "reasons": {},
    }


def test_nvfp4_on_a_cpu_says_why_it_is_not_kitchen(files):
    model = load_svdquant(str(files("flux", "nunchaku-1", "nvfp4")[0]))
    sample(model, "flux")
    section = runs.run_log(model).latest().to_json()["svdquant"]
    assert section["backend"] == "dequant"
    assert "SM100" in section["reasons"]["kitchen"]


def test_low_vram_and_full_load_agree_bit_for_bit(files):
    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    wanted = loaded_flux_output(model)
    low = model.clone()
    low.load(CPU, lowvram_model_memory=0)
    assert low.model.model_lowvram
    assert torch.equal(flux_output(low), wanted)
    low.load(CPU, full_load=True)
    low.partially_unload(CPU, memory_to_free=1 << 40)
    assert torch.equal(flux_output(low), wanted)


def test_dynamic_streaming_rebuilds_the_same_layer(files):
    """What the dynamic loader does to a weight, without its GPU: all parts through one flat
    buffer, then its own cast, which must hand the 4-bit weight on."""
    import comfy.memory_management as memory
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops

    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    module = quantised_layers(model.model)["diffusion_model.single_blocks.0.linear2"]
    x = torch.randn(5, 640)
    wanted = module(x)
    parts = [module.weight, module.bias]
    buffer = torch.empty(memory.vram_aligned_size(parts), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(parts, buffer)
    key = "diffusion_model.single_blocks.0.linear2.weight"
    patches = {key: [(1.0, ("diff", (torch.ones(128, 640),)), 1.0, None, None)]}
    module.weight_lowvram_function = comfy.model_patcher.LowVramPatch(key, patches)
    module._prefetch = {
        "resident": False,
        "xfer_dest": buffer,
        "needs_cast": False,
        "cast_geometry": memory.tensors_to_geometries(parts),
        "signature": None,
    }
    weight, bias = comfy.ops.resolve_cast_module_with_vbar(
        module, module.weight.dtype, CPU, module.weight.dtype, None, False
    )
    streamed = wrap(unwrap(weight), weight.dtype)
    del module._prefetch
    patched = module(x)
    module.weight_lowvram_function = None
    module.weight = torch.nn.Parameter(streamed, requires_grad=False)
    module.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert torch.equal(module(x), wanted)
    assert rel(patched, wanted + x.sum(1, keepdim=True)) < 0.02  # the patch came through


def test_sizes_are_counted_in_loaded_flux_output(files):
    import comfy.model_management

    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    name, module = next(iter(quantised_layers(model.model).items()))
    bias = module.bias.numel() * module.bias.element_size()
    counted = comfy.model_management.module_size(module)
    assert counted == unwrap(module.weight).num_bytes + bias, name


def test_low_vram_pins_whole_layers(files, monkeypatch):
    """Core registers one range per weight; what lies outside of it is copied as pageable memory."""
    import comfy.model_management as management

    pinned = {}

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            pinned[address] = size
            return 0

        def cudaHostUnregister(self, address):
            return 0

    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 2**40)
    monkeypatch.setattr(management, "PINNED_MEMORY", {})
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    for name, module in quantised_layers(model.model).items():
        model.pin_weight_to_device(f"{name}.weight")
        (address, size) = pinned.popitem()
        assert not pinned
        for segment in unwrap(module.weight).segments:
            for part in (t for p in PARTS if (t := getattr(segment, p)) is not None):
                assert address <= part.data_ptr()
                assert part.data_ptr() + part.nbytes <= address + size, name
    model.unpin_all_weights()
    assert not management.PINNED_MEMORY


def test_weights_cannot_be_changed_in_place(files):
    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    key, module = next(iter(quantised_layers(model.model).items()))
    with pytest.raises(FrozenWeightError, match="stay 4-bit"):
        module.weight.dequantize()
    with pytest.raises(FrozenWeightError):
        module.set_weight(torch.zeros(1))
    with pytest.raises(FrozenWeightError):
        model.patch_weight_to_device(f"{key}.weight", CPU, return_weight=True)
    with pytest.raises(FrozenWeightError):
        model.state_dict_for_saving()
    module.weight_function = [lambda weight: weight]
    with pytest.raises(ValueError, match="weight wrapper"):
        flux_output(model)
    module.weight_function = []


def test_clones_keep_the_class_and_reload_alike(files):
    path, _ = files("flux", "nunchaku-1")
    model = load_svdquant(str(path), {"backend": "dequant"})
    clone = model.clone()
    assert type(clone) is type(model)
    function, arguments = model.cached_patcher_init
    again = function(*json.loads(json.dumps(arguments)), disable_dynamic=True)
    assert type(again) is type(model)
    assert torch.equal(loaded_flux_output(again), loaded_flux_output(model))
    deep = model.clone(force_deepcopy=True)
    assert deep.model is not model.model
    assert torch.equal(loaded_flux_output(deep), loaded_flux_output(model))


WORKER = """
import sys, json
sys.path.insert(0, sys.argv[1])
import comfy_home, torch
comfy_home.load_pack(); comfy_home.in_process(); torch.set_num_threads(2)
from slipstream.backends.svdquant.host import load_svdquant
model = load_svdquant(*json.loads(sys.argv[2]))
import comfy.model_management
comfy.model_management.load_models_gpu([model], force_full_load=True)
g = torch.Generator().manual_seed(3)
x, c, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 8), (1, 7, 768), (1, 768)))
with torch.no_grad():
    out = model.model.diffusion_model(
        x, torch.tensor([0.7]), context=c, y=y, guidance=torch.tensor([3.5]))
torch.save(out.float(), sys.argv[3])
"""


def test_another_process_loads_it_by_its_arguments(files, tmp_path):
    model = load_svdquant(str(files("flux", "nunchaku-1")[0]))
    arguments = json.dumps(model.cached_patcher_init[1])
    tests = str(comfy_home.PACK_ROOT / "tests")
    out = tmp_path / "out.pt"
    command = [sys.executable, "-P", "-c", WORKER, tests, arguments, str(out)]
    subprocess.run(command, check=True, timeout=120)
    assert torch.equal(torch.load(out, weights_only=True), loaded_flux_output(model))


def test_widgets_that_contradict_the_file(files):
    path = str(files("flux", "nunchaku-1")[0])
    with pytest.raises(CheckpointError, match=r"int4 .* but precision=nvfp4 was requested"):
        load_svdquant(path, {"precision": "nvfp4"})
    with pytest.raises(CheckpointError, match="rank 32, but rank=128 was requested"):
        load_svdquant(path, {"rank": 128})
    with pytest.raises(BackendError, match=r"backend nunchaku cannot run .* auto or dequant"):
        load_svdquant(path, {"backend": "nunchaku"})
    with pytest.raises(ValueError, match="backend is 'fast'"):
        load_svdquant(path, {"backend": "fast"})
    model = load_svdquant(path, {"precision": "int4", "rank": 32, "backend": "kitchen"})
    assert len(quantised_layers(model.model)) > 0


def test_sampling_leaves_nothing_behind(files):
    model = quantised_model("flux", files("flux", "nunchaku-1")[0])
    sample(model, "flux")
    engine = runs.attached(model)["svdquant"].engine
    assert engine.session is None
    for module in quantised_layers(model.model).values():
        assert not module.lora_patches
        assert not module.weight_function
