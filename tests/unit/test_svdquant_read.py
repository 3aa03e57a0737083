"""Files of every dialect, written by hand-made names and addresses, are read to the same model."""

import pytest
import svdquant_models
import torch
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.weight import QuantWeight, effective, unsigned_output

CASES = [
    ("flux", "nunchaku-1", "int4"),
    ("flux", "nunchaku-1", "nvfp4"),
    ("flux", "nunchaku-2", "int4"),
    ("flux", "nunchaku-lite", "int4"),
    ("flux", "nunchaku-lite", "nvfp4"),
    ("flux", "comfy-kitchen", "int4"),
    ("qwen-image", "nunchaku-2", "int4"),
    ("qwen-image", "nunchaku-2", "nvfp4"),
    ("qwen-image", "nunchaku-lite", "int4"),
    ("qwen-image", "comfy-kitchen", "int4"),
    ("z-image", "nunchaku-2", "int4"),
    ("z-image", "nunchaku-2", "nvfp4"),
    ("z-image", "nunchaku-lite", "int4"),
    ("z-image", "comfy-kitchen", "int4"),
    ("sdxl", "nunchaku-1", "int4"),
    ("sdxl", "nunchaku-1", "nvfp4"),
    ("sdxl", "nunchaku-2", "int4"),
    ("sdxl", "nunchaku-lite", "int4"),
    ("sdxl", "comfy-kitchen", "int4"),
]


def read(path, dtype=torch.bfloat16):
    checkpoint = detect(read_header(path))
    return checkpoint, dict(assemble(checkpoint, dtype))


def dense_of(value):
    return effective(value) if isinstance(value, QuantWeight) else value.float()


@pytest.mark.parametrize(("family", "dialect", "precision"), CASES)
def test_every_dialect_reads_to_its_dense_model(family, dialect, precision, tmp_path):
    path = tmp_path / "model.safetensors"
    wanted = svdquant_models.write(path, family, dialect, precision=precision)
    checkpoint, got = read(path)
    assert (checkpoint.family.id, checkpoint.dialect) == (family, dialect)
    assert checkpoint.precision == precision
    assert checkpoint.ranks == (32,)
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        dense = dense_of(value)
        if name.endswith(".bias"):
            weight = got[name.removesuffix("bias") + "weight"]
            if isinstance(weight, QuantWeight):
                dense = dense + unsigned_output(weight)
        error = (dense - wanted[name]).norm() / wanted[name].norm()
        assert error < 4e-3, f"{name}: {error:.2e}"  # bias and zeros are 16-bit
        if isinstance(value, QuantWeight) and value.segments[0].facts.precision != "awq":
            assert error < 1e-6, f"{name}: {error:.2e}"


def test_shapes_and_kinds_are_what_comfyui_sees(tmp_path):
    path = tmp_path / "model.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1")
    _, got = read(path)
    linear1, linear2 = got["single_blocks.0.linear1.weight"], got["single_blocks.0.linear2.weight"]
    assert linear1.shape == (7 * 128, 128)
    assert len(linear1.segments) == 1  # same smoothing: one weight of rank 64
    assert linear1.segments[0].down.shape == (128, 64)
    assert linear2.shape == (128, 5 * 128)
    assert [s.facts.unsigned for s in linear2.segments] == [False, True]
    assert [s.facts.column for s in linear2.segments] == [0, 128]
    assert got["double_blocks.0.img_mlp.2.weight"].segments[0].facts.unsigned
    assert got["double_blocks.0.img_mod.lin.weight"].segments[0].facts.precision == "awq"


def test_q_k_v_of_one_file_layer_share_their_input(tmp_path):
    path = tmp_path / "model.safetensors"
    svdquant_models.write(path, "qwen-image", "nunchaku-2")
    _, got = read(path)
    facts = [
        got[f"transformer_blocks.0.attn.{n}.weight"].segments[0].facts
        for n in ("to_q", "to_k", "to_v", "add_q_proj")
    ]
    assert facts[0].shared == facts[1].shared == facts[2].shared > 0
    assert facts[3].shared not in (0, facts[0].shared)
    assert facts[0].num_sharing == 3


def test_layers_of_different_smoothing_stay_apart(tmp_path):
    path = tmp_path / "model.safetensors"
    wanted = svdquant_models.write(path, "z-image", "nunchaku-lite")
    _, got = read(path)
    qkv = got["layers.0.attention.qkv.weight"]
    assert [(s.facts.row, s.facts.num_rows) for s in qkv.segments] == [
        (0, 256),
        (256, 256),
        (512, 256),
    ]
    rows = slice(200, 600)
    part = effective(qkv, rows)
    assert torch.allclose(part, wanted["layers.0.attention.qkv.weight"][rows], atol=1e-6)


def test_refiners_may_stay_in_16_bits(tmp_path):
    path = tmp_path / "model.safetensors"
    wanted = svdquant_models.write(path, "z-image", "nunchaku-2", dense_refiners=True)
    _, got = read(path)
    name = "noise_refiner.0.feed_forward.w1.weight"
    assert isinstance(got[name], torch.Tensor)
    assert torch.equal(got[name].float(), wanted[name])
    assert isinstance(got["layers.0.feed_forward.w1.weight"], QuantWeight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_casts_of_the_same_values(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1")
    _, base = read(path)
    _, other = read(path, dtype)
    name = "double_blocks.0.img_attn.qkv"
    a, b = (t[f"{name}.weight"].segments[0] for t in (base, other))
    assert b.smooth.dtype == b.scale.dtype == b.up.dtype == dtype
    assert torch.equal(a.q, b.q)
    assert torch.allclose(a.up.float(), b.up.float(), atol=1e-4)
    assert other[f"{name}.bias"].dtype == dtype
