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
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.layout import unwrap
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
    module = next(m for m in found.values() if unwrap(m.weight).segments[0].smooth is not None)
    four_bit = step(core.quantised_model(one, heads, path, "reference"), name)
    assert 1e-6 < rel(four_bit, wanted) < 0.2
    unwrap(module.weight).segments[0].smooth.mul_(1.5)
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


def test_nunchaku_lite_of_ernie_has_comfyuis_own_names(folder):
    one, heads = tiny_family("ernie")
    path = folder / "ernie-lite.safetensors"
    dense, layers = core.write(path, core.network(one, heads), dialect="nunchaku-lite")
    wanted = step(core.dense_model(one, heads, dense), "ernie")
    model = core.quantised_model(one, heads, path, "dequant")
    assert len(quantised_layers(model.model)) == len(layers) > 8
    assert rel(step(model, "ernie"), wanted) < 3e-6


def test_int4_chroma_of_an_undocumented_exporter_is_refused(folder):
    one, heads = tiny_family("chroma")
    for precision in ("int4", "nvfp4"):
        path = folder / f"chroma-attn-{precision}.safetensors"
        network = core.network(one, heads)
        diffusers.write(
            path, network, "chroma", "nunchaku-1", precision=precision, norm="attn.norm_"
        )
    with pytest.raises(CheckpointError, match=r"int4 Chroma file of an exporter .* nvfp4"):
        load_svdquant(str(folder / "chroma-attn-int4.safetensors"))
    assert detect(read_header(path)).precision == "nvfp4"


# ComfyUI's detection takes these sizes from nowhere: they are the published ones
FULL_WIDTH = {
    "chroma": (24, {"hidden_dim": 5120, "n_layers": 5}),
    "ernie": (32, {}),
    "krea2": (4, {}),
}


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_models_without_a_small_file_are_detected_from_their_shapes(name, tmp_path):
    """Shapes of the published widths; of the values only the vectors', which detection may see."""
    from slipstream.backends.svdquant.dialects import Checkpoint
    from slipstream.backends.svdquant.families import CORE
    from slipstream.backends.svdquant.file_layers import FileLayer
    from slipstream.backends.svdquant.header import Header, TensorEntry
    from slipstream.backends.svdquant.host_detection import detected_config

    heads, sizes = FULL_WIDTH[name]
    one = core.family_of(name, **sizes)
    config = tiny._config_class(one)(one.unet(heads))
    config.unet_config.update(one.unet(heads))
    network = config.get_model({}, "", device=torch.device("meta")).diffusion_model
    layers, entries, vectors = {}, {"scale": TensorEntry("BF16", (), 0, 0)}, {}
    for key, tensor in network.state_dict().items():
        owner, _, kind = key.rpartition(".")
        if kind == "weight" and "." in owner and tensor.ndim == 2:
            rows, columns = tensor.shape
            layers[owner] = FileLayer(
                name=owner,
                precision="int4",
                num_rows=rows,
                num_columns=columns,
                rank=32,
                parts={"scale": "scale"},
            )
        else:
            entries[key] = TensorEntry("BF16", tuple(tensor.shape), 0, 0)
            if tensor.ndim == 1:
                vectors[key] = torch.zeros(tensor.shape)
    save_file(vectors, tmp_path / "file.safetensors")
    checkpoint = Checkpoint(
        header=Header(tmp_path / "file.safetensors", entries, {}),
        dialect="comfy-kitchen",
        family=CORE,
        native=True,
        layers=layers,
        dense={key: key for key in entries if key != "scale"},
    )
    assert len(layers) > 10
    assert type(detected_config(checkpoint)).__name__ == one.config


# ---- what else such a file may hold ----
def settings(**values):
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def in_comfyui_formats(name, weight):
    """One layer in fp8 and one in int8, as ComfyUI's own loader reads them."""
    if name.endswith("ffn.0"):
        scale = weight.abs().max() / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        kind = "float8_e4m3fn"
    elif name.endswith("ffn.2"):
        scale = weight.abs().max() / 127
        stored = (weight / scale).round().to(torch.int8)
        kind = "int8_tensorwise"
    else:
        return None
    parts = {"weight": stored, "weight_scale": scale, "comfy_quant": settings(format=kind)}
    return parts, stored.float() * scale


@pytest.fixture(scope="module")
def wan(folder):
    """(path, dense state, names) of a Wan file that mixes formats."""
    one, heads = tiny_family("wan")
    path = folder / "wan-mixed.safetensors"
    dense, layers = core.write(path, core.network(one, heads), others=in_comfyui_formats)
    return path, dense, layers


def dense_but_for_comfyuis_formats(path, dense, **changed):
    """ComfyUI's own loader, given dense weights and the two layers as the file holds them."""
    import comfy.sd

    stored = {n: t for n, t in load_file(path).items() if ".ffn." in n and "blocks.0." in n}
    state = {**dense, **stored, **changed}
    options = {"dtype": torch.float32}
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)


def test_layers_in_comfyuis_own_formats_are_computed_by_comfyui(wan):
    path, dense, layers = wan
    wanted = step(dense_but_for_comfyuis_formats(path, dense), "wan")
    model = load_svdquant(str(path), {"backend": "dequant", "dtype": "fp32"})
    network = model.model.diffusion_model
    kinds = {m.quant_format for m in network.modules() if getattr(m, "quant_format", None)}
    assert kinds == {"float8_e4m3fn", "int8_tensorwise"}
    assert len(quantised_layers(model.model)) == len(layers) - 2
    assert rel(step(model, "wan"), wanted) < 1e-5
    key = "diffusion_model.blocks.0.ffn.0.weight"
    patches = {key: ("diff", (torch.full_like(dense[key[16:]], 0.02),))}
    theirs = dense_but_for_comfyuis_formats(path, dense)
    theirs.add_patches(patches)
    ours = model.clone()
    ours.add_patches(patches)
    assert rel(step(theirs, "wan"), wanted) > 1e-3
    assert rel(step(ours, "wan"), step(theirs, "wan")) < 1e-5


def test_settings_in_the_metadata_mean_the_same(wan, folder):
    path = wan[0]
    tensors, layers = load_file(path), {}
    for name in [n for n in tensors if n.endswith(".comfy_quant")]:
        text = bytes(tensors.pop(name).tolist())
        layers[name.removesuffix(".comfy_quant")] = json.loads(text)
    moved = folder / "wan-metadata.safetensors"
    save_file(tensors, moved, metadata={"_quantization_metadata": json.dumps({"layers": layers})})
    model, same = (load_svdquant(str(p), {"backend": "dequant"}) for p in (moved, path))
    assert torch.equal(step(model, "wan"), step(same, "wan"))


def test_a_format_that_comfyui_does_not_know_is_named(wan, folder):
    tensors = load_file(wan[0])
    tensors["blocks.0.ffn.0.comfy_quant"] = settings(format="int3_new")
    path = folder / "wan-new.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"ffn.0 is quantised as int3_new.*Update ComfyUI"):
        load_svdquant(str(path))


def test_of_a_whole_checkpoint_the_diffusion_model_is_read(wan, folder):
    from slipstream.backends.svdquant.host_detection import title_of
    from slipstream.backends.svdquant.inspection import inspect_text

    tensors = {f"model.diffusion_model.{n}": t for n, t in load_file(wan[0]).items()}
    tensors["vae.decoder.conv.weight"] = torch.zeros(3, 3)
    tensors["text_encoders.t5.weight"] = torch.zeros(3, 3)
    path = folder / "checkpoint.safetensors"
    save_file(tensors, path)
    model, same = (load_svdquant(str(p), {"backend": "dequant"}) for p in (path, wan[0]))
    assert torch.equal(step(model, "wan"), step(same, "wan"))
    checkpoint = detect(read_header(path))
    text = inspect_text(checkpoint, torch.device("cpu"), title=title_of(checkpoint))
    assert "Family: WAN21_T2V (ComfyUI's own names). Dialect: comfy-kitchen." in text
    assert "Layers that ComfyUI computes itself: 1 float8_e4m3fn, 1 int8_tensorwise." in text
    assert "Not read: 2 tensors outside the diffusion model" in text


def changed(path, folder, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    return str(folder / "changed.safetensors")


def test_what_comfyui_does_not_detect_is_refused_before_it_is_read(wan, folder, monkeypatch):
    from slipstream.backends.svdquant import host

    monkeypatch.setattr(host, "read_model", None)  # reading would fail
    renamed = {}
    for name, tensor in load_file(wan[0]).items():
        renamed[name.replace("blocks.", "parts.").replace("head.", "top.")] = tensor
    path = folder / "unknown.safetensors"
    save_file(renamed, path)
    with pytest.raises(CheckpointError, match=r"model that this ComfyUI does not know .*Update"):
        load_svdquant(str(path))

    def without_text(tensors):
        del tensors["patch_embedding.weight"]

    with pytest.raises(CheckpointError, match=r"not a model that ComfyUI can detect \(KeyError"):
        load_svdquant(changed(wan[0], folder, without_text))


def test_missing_and_left_over_tensors(wan, folder, caplog):
    def truncated(tensors):
        del tensors["blocks.0.norm3.weight"]

    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of .*blocks.0.norm3.weight"):
        load_svdquant(changed(wan[0], folder, truncated))

    def more(tensors):
        for name in [n for n in tensors if n.startswith("blocks.0.self_attn.q.")]:
            tensors[name.replace("self_attn.q", "other.q")] = tensors[name].clone()

    with pytest.raises(CheckpointError, match=r"1 tensors that ComfyUI's .*blocks.0.other.q"):
        load_svdquant(changed(wan[0], folder, more))

    def plain(tensors):
        tensors["rope_table"] = torch.zeros(3)

    load_svdquant(changed(wan[0], folder, plain))
    assert "as with Load Diffusion Model: rope_table" in caplog.text


def test_norms_may_be_called_scale_as_flux_calls_them(folder):
    import svdquant_models
    from svdquant_networks import SIZES

    path = folder / "flux-scale.safetensors"
    svdquant_models.write(path, "flux", "comfy-kitchen", **SIZES["flux"])

    def renamed(tensors):
        for name in [n for n in tensors if n.endswith("_norm.weight")]:
            tensors[name.removesuffix("weight") + "scale"] = tensors.pop(name)

    model = load_svdquant(changed(path, folder, renamed), {"backend": "dequant"})
    same = load_svdquant(str(path), {"backend": "dequant"})
    assert torch.equal(step(model, "flux"), step(same, "flux"))


# ---- as any model ----
def test_lora_cache_and_attention_on_a_model_that_no_table_knows(wan):
    path, dense, _ = wan
    model = load_svdquant(str(path), {"backend": "dequant", "dtype": "fp32"})
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*s, generator=generator) * 0.1 for s in ((128, 4), (4, 128)))
    patched = model.clone()
    patched.add_patches({key: ("diff", (up @ down,))}, 0.5)
    merged = {key[16:]: dense[key[16:]] + 0.5 * up @ down}
    wanted = step(dense_but_for_comfyuis_formats(path, dense, **merged), "wan")
    assert rel(wanted, step(model, "wan")) > 1e-3
    assert rel(step(patched, "wan"), wanted) < 1e-4

    cached = apply_cache(apply_attention(patched, AttentionConfig()), CacheConfig(front_blocks=1))
    out = flat(tiny.sample(cached, "wan", steps=4, cfg=1.0))
    report = runs.run_log(cached).latest().to_json()
    assert report["svdquant"]["lora_layers"] == 1
    assert {"svdquant", "attention", "cache"} <= set(report)
    assert bool(torch.isfinite(out).all())


def test_a_worker_rebuilds_it_from_its_arguments(wan):
    model = load_svdquant(str(wan[0]), {"backend": "dequant"})
    function, arguments = model.cached_patcher_init
    again = function(*json.loads(json.dumps(arguments)), disable_dynamic=True)
    assert type(again.model.model_config).__name__ == "WAN21_T2V"
    assert torch.equal(step(again, "wan"), step(model, "wan"))
    deep = model.clone(force_deepcopy=True)
    assert torch.equal(step(deep, "wan"), step(model, "wan"))


def test_a_two_file_folder_is_a_model(folder):
    import svdquant_models
    from slipstream.backends.svdquant.halves import BLOCKS, REST
    from svdquant_networks import SIZES

    path = folder / "flux.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", **SIZES["flux"])
    tensors, old = load_file(path), folder / "svdq-int4-flux.1-dev"
    old.mkdir()
    blocks = {n: t for n, t in tensors.items() if "transformer_blocks." in n}
    save_file(blocks, old / BLOCKS)
    save_file({n: t for n, t in tensors.items() if n not in blocks}, old / REST)
    wanted = step(load_svdquant(str(path), {"backend": "dequant"}), "flux")
    for chosen in (BLOCKS, REST):
        model = load_svdquant(str(old / chosen), {"backend": "dequant"})
        assert torch.equal(step(model, "flux"), wanted)
    function, arguments = model.cached_patcher_init
    assert torch.equal(step(function(*arguments), "flux"), wanted)
