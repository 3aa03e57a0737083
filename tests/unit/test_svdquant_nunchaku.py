"""Converted files against the rules of Nunchaku's strict loaders, and 2511 and Layered both ways.

The rules are tests/nunchaku_rules.py; tests/host/test_svdquant_nunchaku.py holds them, at full
width, against the classes of diffusers that Nunchaku builds on.
"""

import dataclasses
import json

import nunchaku_rules
import pytest
import svdquant_models
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.config import ConvertConfig
from slipstream.backends.svdquant.convert import convert
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.inspection import inspect_text

MARKER = "__index_timestep_zero__"
EMBEDDING = "time_text_embed.addition_t_embedding.weight"
SIZES = {
    "flux": {"depth": 1, "single": 1},
    "qwen-image": {"depth": 1},
    # a width at which ComfyUI's and diffusers' feed-forward agree, as they do at 3840
    "z-image": {"hidden": 384, "wide": 1024},
}
MODELS = ("flux", "flux-schnell", "qwen-image", "edit-2509", "edit-2511", "layered", "z-image")
FLAGS = {
    "edit-2511": {"zero_cond_t": True},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}


def family_of(model):
    return {"flux-schnell": "flux", "z-image": "z-image", "flux": "flux"}.get(model, "qwen-image")


def dense_file(folder, model):
    """A 16-bit file in ComfyUI's names, as Comfy-Org publishes them."""
    family = family_of(model)
    path = folder / "any.safetensors"
    dense = svdquant_models.write(path, family, svdquant_models.OWN[family], **SIZES[family])
    state = {name: tensor.bfloat16().contiguous() for name, tensor in dense.items()}
    if model == "flux-schnell":
        state = {n: t for n, t in state.items() if not n.startswith("guidance_in.")}
    if model == "z-image":  # whatever the width
        state["t_embedder.mlp.0.weight"] = torch.randn(1024, 256).bfloat16()
        state["t_embedder.mlp.0.bias"] = torch.randn(1024).bfloat16()
        state["t_embedder.mlp.2.weight"] = torch.randn(256, 1024).bfloat16()
    if model == "edit-2511":
        state[MARKER] = torch.tensor([])
    if model == "layered":
        state[EMBEDDING] = torch.randn(2, 128).bfloat16()
    path = folder / f"{model}.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_strict_load_takes_what_convert_writes(model, precision, tmp_path):
    source = dense_file(tmp_path, model)
    path = convert(source, tmp_path / "out.safetensors", ConvertConfig(precision=precision))
    header = read_header(path)
    assert nunchaku_rules.problems(header) == []
    config = header.json("config")
    flags = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    assert {k: config[k] for k in flags if k in config} == FLAGS.get(model, {})


def test_the_rules_see_what_a_strict_load_refuses(tmp_path):
    source = dense_file(tmp_path, "z-image")
    path = convert(source, tmp_path / "out.safetensors", ConvertConfig(precision="nvfp4"))
    header = read_header(path)
    entry = next(iter(header.tensors.values()))

    def broken(changes, gone=()):
        tensors = {n: e for n, e in header.tensors.items() if n not in gone} | changes
        return nunchaku_rules.problems(dataclasses.replace(header, tensors=tensors))

    assert broken({MARKER: entry}) == [f"unexpected {MARKER}"]
    name = "layers.0.attention.to_qkv"
    assert broken({f"{name}.wtscale": entry}) == [f"{name}.wtscale would be ignored"]
    assert broken({}, [f"{name}.wcscales"]) == []  # ones
    assert broken({}, [f"{name}.smooth_factor"]) == [f"missing {name}.smooth_factor"]
    pad = dataclasses.replace(header.tensors["x_pad_token"], shape=(384,))
    assert broken({"x_pad_token": pad})[0].startswith("x_pad_token is ('BF16', (384,))")


@pytest.mark.parametrize("family", SIZES)  # SDXL: host/test_svdquant_sdxl.py, by its names
def test_fused_qkv_has_a_factor_per_row(family, tmp_path):
    """Nunchaku's fused q, k, v of Z-Image ignores wtscale; everything honours wcscales."""
    path = tmp_path / "any.safetensors"
    dense = svdquant_models.write(path, family, svdquant_models.OWN[family])
    save_file({n: t.bfloat16().contiguous() for n, t in dense.items()}, tmp_path / "s.safetensors")
    config = ConvertConfig(precision="nvfp4")
    tensors = load_file(convert(tmp_path / "s.safetensors", tmp_path / "out.safetensors", config))
    fused = [n for n in tensors if "qkv" in n and n.endswith(".qweight")]
    assert fused
    for name in (n.removesuffix(".qweight") for n in fused):
        assert f"{name}.wtscale" not in tensors
        rows = tensors[f"{name}.wcscales"]
        assert rows.dtype == torch.bfloat16
        assert rows.shape == (tensors[f"{name}.qweight"].shape[0],)
        assert 0 < float(rows.max()) < 0.1  # a real factor, not the ones of a missing key
    for name in (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")):
        if f"{name}.smooth" in tensors or f"{name}.smooth_factor" in tensors:
            assert (f"{name}.wtscale" in tensors) != (f"{name}.wcscales" in tensors)


# ---- loading ----
def nunchaku_file(folder, name, config=None, extra=None):
    path = folder / name
    svdquant_models.write(path, "qwen-image", "nunchaku-2")
    metadata = {"quantization_config": json.dumps({"method": "svdquant"})}
    if config is not None:
        metadata["config"] = json.dumps(config)
    save_file({**load_file(path), **(extra or {})}, path, metadata=metadata)
    return path


def read(path):
    checkpoint = detect(read_header(path))
    return checkpoint, dict(assemble(checkpoint, torch.bfloat16))


def test_the_flag_of_2511_becomes_comfyuis_marker(tmp_path):
    _, plain = read(nunchaku_file(tmp_path, "a.safetensors", {"zero_cond_t": False}))
    assert MARKER not in plain
    checkpoint, state = read(nunchaku_file(tmp_path, "b.safetensors", {"zero_cond_t": True}))
    assert state.keys() == plain.keys() | {MARKER}
    assert state[MARKER].numel() == 0
    assert "Variant: Qwen-Image-Edit-2511" in inspect_text(checkpoint, torch.device("cpu"))
    # and from 16 bits back to 16 bits
    source = dense_file(tmp_path, "edit-2511")
    _, state = read(convert(source, tmp_path / "c.safetensors", ConvertConfig()))
    assert MARKER in state


def test_a_file_that_has_the_marker_already_keeps_it_once(tmp_path):
    extra = {MARKER: torch.tensor([])}
    path = nunchaku_file(tmp_path, "svdq-2511.safetensors", {"zero_cond_t": True}, extra)
    checkpoint, state = read(path)
    assert state[MARKER].numel() == 0
    assert "Doubt" not in inspect_text(checkpoint, torch.device("cpu"))
    path = tmp_path / "kitchen-2511.safetensors"
    svdquant_models.write(path, "qwen-image", "comfy-kitchen")
    save_file({**load_file(path), MARKER: torch.tensor([])}, path)
    checkpoint, state = read(path)
    assert MARKER in state
    text = inspect_text(checkpoint, torch.device("cpu"))
    assert "Variant: Qwen-Image-Edit-2511" in text
    assert "Doubt" not in text


@pytest.mark.parametrize("config", [None, {"zero_cond_t": False}])
def test_2511_in_the_name_alone_is_said_and_not_guessed(config, tmp_path):
    name = "svdq-int4_r32-qwen-image-edit-2511.safetensors"
    checkpoint, state = read(nunchaku_file(tmp_path, name, config))
    assert MARKER not in state
    text = inspect_text(checkpoint, torch.device("cpu"))
    assert "Doubt: the file's name says 2511" in text
    assert "FluxKontextMultiReferenceLatentMethod" in text
    assert "index_timestep_zero" in text


def test_layered_needs_its_embedding(tmp_path):
    flags = FLAGS["layered"]
    with pytest.raises(CheckpointError, match=f"lacks {EMBEDDING}.*Qwen-Image-Layered"):
        read(nunchaku_file(tmp_path, "a.safetensors", flags))
    extra = {EMBEDDING: torch.randn(2, 128).bfloat16()}
    checkpoint, state = read(nunchaku_file(tmp_path, "b.safetensors", flags, extra))
    assert torch.equal(state[EMBEDDING], extra[EMBEDDING])
    assert MARKER not in state
    assert "Variant: Qwen-Image-Layered" in inspect_text(checkpoint, torch.device("cpu"))
    source = dense_file(tmp_path, "layered")
    _, state = read(convert(source, tmp_path / "c.safetensors", ConvertConfig()))
    assert torch.equal(state[EMBEDDING], load_file(source)[EMBEDDING])
