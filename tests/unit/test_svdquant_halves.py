"""Models in two files (Nunchaku's old folders): either is the whole model, a lone one says so."""

import json

import pytest
import svdquant_models
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.halves import BLOCKS, REST, read_model_header
from slipstream.backends.svdquant.layout import unwrap, wrap
from slipstream.backends.svdquant.weight import QuantWeight

CONFIG = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "svdq-int4_r32-flux.1-dev.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1")
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """The same model as the old folders hold it."""
    folder = tmp_path / "svdq-int4-flux.1-dev"
    folder.mkdir()
    split(whole, folder / BLOCKS, folder / REST)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def split(whole, blocks, rest):
    tensors = load_file(whole)
    inside = {n: t for n, t in tensors.items() if "transformer_blocks." in n}
    save_file(inside, blocks)
    save_file({n: t for n, t in tensors.items() if n not in inside}, rest)


def tensors_of(path):
    read = assemble(detect(read_model_header(path)), torch.bfloat16)
    found = {}
    for name, value in read:
        if isinstance(value, QuantWeight):
            parts = unwrap(wrap(value, torch.bfloat16)).segments
            for i, segment in enumerate(parts):
                kinds = ("q", "scale", "smooth", "down", "up")
                found |= {f"{name}:{i}:{k}": getattr(segment, k) for k in kinds}
        else:
            found[name] = value
    return {name: t for name, t in found.items() if t is not None}


@pytest.mark.parametrize("chosen", [BLOCKS, REST, ""])
def test_either_half_is_the_whole_model(chosen, whole, folder):
    wanted, got = tensors_of(whole), tensors_of(folder / chosen)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_header_names_both_files_and_the_folders_config(whole, folder):
    header = read_model_header(folder / REST)
    assert header.paths == (folder / REST, folder / BLOCKS)
    assert header.path_of("x_embedder.weight") == folder / REST
    assert header.path_of("transformer_blocks.0.qkv_proj.qweight") == folder / BLOCKS
    assert header.size == sum(path.stat().st_size for path in header.paths)
    assert header.json("config") == CONFIG
    raw = header.read_bytes("transformer_blocks.0.norm_q.weight")
    stored = load_file(whole)["transformer_blocks.0.norm_q.weight"]
    assert raw == stored.view(torch.uint8).numpy().tobytes()
    assert read_model_header(whole).paths == (whole,)


def test_a_renamed_blocks_file_finds_the_rest_beside_it(whole, tmp_path):
    """svdquant-models has svdq-int4-flux.1-dev.safetensors: the blocks alone."""
    path = tmp_path / "svdq-int4-flux.1-dev.safetensors"
    split(whole, path, tmp_path / REST)
    assert tensors_of(path).keys() == tensors_of(whole).keys()


@pytest.mark.parametrize(("chosen", "missing"), [(BLOCKS, REST), (REST, BLOCKS)])
def test_a_lone_half_names_the_file_it_lacks(chosen, missing, folder):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"half of a Nunchaku model.* Put {missing} of"):
        read_model_header(folder / chosen)


def test_two_files_of_different_models_are_refused(folder, whole):
    save_file(load_file(whole), folder / REST)
    with pytest.raises(CheckpointError, match=r"both hold .*: they are not the two halves"):
        read_model_header(folder / BLOCKS)


def test_a_damaged_half_or_config_is_no_surprise(folder):
    (folder / "config.json").write_text("[1]")
    assert read_model_header(folder / BLOCKS).json("config") == {}
    (folder / REST).write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=f"{REST} is not a safetensors file"):
        read_model_header(folder / BLOCKS)
