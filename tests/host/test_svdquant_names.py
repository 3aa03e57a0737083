"""SVDQuant files that no family table has to know: ComfyUI's own names, and diffusers' names of
models whose conversion is public. Through the real loader to a sampler step against the dense
model, as in test_svdquant_host.py."""

import json

import pytest
import svdquant_core as core
import svdquant_diffusers as diffusers
import tiny
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends import run as runs
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from svdquant_networks import rel

pytestmark = pytest.mark.usefixtures("comfy")
full = pytest.mark.full

# sizes: fewer blocks, for speed; heads: so that layers are multiples of 128
MODELS = {
    "chroma": {"depth": 1, "depth_single_blocks": 1},
    "flux2": {"depth": 1, "depth_single_blocks": 1},
    "wan": {},
    "ltxav": {"num_layers": 1},
    "ernie": {},
    "minimax_h3": {},
    "krea2": {},
    "hunyuan_video": {},
    "lumina2": {},
    "cosmos_predict2": {},
    "ltxv": {},
}
HEADS = {"ltxav": 2, "ltxv": 2}
FULL = ("hunyuan_video", "lumina2", "cosmos_predict2", "ltxv")


def flat(latent):
    """A latent as one tensor, nested ones too."""
    tensors = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    return torch.cat([t.flatten().float() for t in tensors])


def step(model, family):
    """One sampler step without guidance: one model call."""
    return flat(tiny.sample(model, family, steps=1, cfg=1.0))


def tiny_family(name):
    one = core.family_of(name, **MODELS[name])
    return one, max(HEADS.get(name, 1), one.min_heads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("names")


CASES = [pytest.param(n, marks=full) if n in FULL else n for n in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_any_model_of_comfyui_loads_in_its_own_names(name, folder):
    """Layers in turn tile-packed and natural, modulation in 4 bits; unpacked weights in fp32 are
    the dense model, 4-bit inputs cost some percent, a wrong scale is caught."""
    one, heads = tiny_family(name)
    path = folder / f"{name}.safetensors"
    metadata = core.config_metadata(one, heads)
    dense, layers = core.write(path, core.network(one, heads), metadata=metadata)
    assert len(layers) >= 4
    wanted = step(core.dense_model(one, heads, dense), name)
    model = core.quantised_model(one, heads, path, "dequant")
    assert rel(step(model, name), wanted) < 3e-6
    found = quantised_layers(model.model)
    assert {n.removeprefix("diffusion_model.") for n in found} == set(layers)
    section = runs.run_log(model).latest().to_json()["svdquant"]
    assert section["family"] == ("z-image" if name == "z_image" else one.config)
    assert section["layers"] == len(layers)
    module = next(m for m in found.values() if m.weight._params.smooth0 is not None)
    four_bit = step(core.quantised_model(one, heads, path, "reference"), name)
    assert 1e-6 < rel(four_bit, wanted) < 0.2
    module.weight._params.smooth0.mul_(1.5)
    assert rel(step(model, name), wanted) > 3e-6


NAMED = [
    ("flux2", "nunchaku-lite", "int4"),
    ("minimax_h3", "nunchaku-lite", "int4"),
    ("chroma", "nunchaku-1", "int4"),
    ("flux2", "nunchaku-2", "nvfp4"),
    pytest.param("flux2", "nunchaku-1", "int4", marks=full),
    pytest.param("flux2", "nunchaku-lite", "nvfp4", marks=full),
    pytest.param("chroma", "nunchaku-1", "nvfp4", marks=full),
    pytest.param("minimax_h3", "nunchaku-lite", "nvfp4", marks=full),
]


@pytest.mark.parametrize(("name", "dialect", "precision"), NAMED)
def test_names_of_diffusers_and_nunchaku(name, dialect, precision, folder):
    one, heads = tiny_family(name)
    path = folder / f"{name}-{dialect}-{precision}.safetensors"
    network = core.network(one, heads)
    if name == "minimax_h3":  # what diffusers computes from two numbers
        frequencies = 10000.0 ** -(torch.arange(16) / 16)
        network.model.diffusion_model.rope.inv_freq.copy_(frequencies)
    dense = diffusers.write(path, network, name, dialect, precision=precision)
    wanted = step(core.dense_model(one, heads, dense), name)
    model = core.quantised_model(one, heads, path, "dequant")
    assert rel(step(model, name), wanted) < 3e-6
    four_bit = step(core.quantised_model(one, heads, path, "reference"), name)
    assert 1e-6 < rel(four_bit, wanted) < 0.2


def test_int4_chroma_of_an_undocumented_exporter_is_refused(folder):
    one, heads = tiny_family("chroma")
    for precision in ("int4", "nvfp4"):
        path = folder / f"chroma-attn-{precision}.safetensors"
        network = core.network(one, heads)
        diffusers.write(
            path, network, "chroma", "nunchaku-1", precision=precision, norm="attn.norm_"
        )
    with pytest.raises(CheckpointError, match="int4 Chroma file of an exporter .* nvfp4 version"):
        load_svdquant(str(folder / "chroma-attn-int4.safetensors"))
    assert detect(read_header(path)).precision == "nvfp4"
