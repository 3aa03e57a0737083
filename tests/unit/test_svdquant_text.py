"""4-bit text encoder files: the layout against the format's rules, and what is refused."""

import pytest
import svdquant_golden as golden
import svdquant_models
import svdquant_text
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant import layouts
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.text_files import detect_text
from slipstream.backends.svdquant.weight import QuantWeight, effective


def values(path, dtype=torch.float32):
    checkpoint = detect_text(read_header(path))
    assert checkpoint is not None
    return checkpoint, dict(assemble(checkpoint, dtype))


def nunchakus_halves(codes):
    """int16 [N/4, K] of codes 0..15, by the words of Nunchaku's rule: per row, 32 columns make 8
    halves, half j of columns j, 8 + j, 16 + j, 24 + j; four rows take turns every 64 columns."""
    num_rows, num_columns = codes.shape
    packed = torch.zeros(num_rows // 4, num_columns, dtype=torch.int32)
    for n in range(num_rows):
        for start in range(0, num_columns, 32):
            for j in range(8):
                half = sum(int(codes[n, start + 8 * t + j]) << (4 * t) for t in range(4))
                at = start // 64 * 64 + (n % 4) * 16 + start % 64 // 32 * 8 + j
                packed[n // 4, at] = half
    return packed.to(torch.int16)


def test_the_packing_both_ways():
    codes = torch.randint(0, 16, (8, 256), generator=torch.Generator().manual_seed(0))
    packed = nunchakus_halves(codes)
    assert torch.equal(golden.pack_awq(codes).view(torch.int16).view(2, 256), packed)
    plain = layouts.awq_from_file(packed.view(torch.int32))
    assert torch.equal(layouts.codes_from_plain(plain, signed=False).long(), codes)
    assert torch.equal(layouts.awq_to_file(plain).view(torch.int16).view(2, 256), packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nunchakus_t5_reads_to_its_dense_model(dtype, tmp_path):
    path = tmp_path / "t5.safetensors"
    dense = svdquant_text.write_t5(path, dtype=dtype)
    checkpoint, got = values(path)
    assert checkpoint.dialect == "nunchaku-text"
    assert got.keys() == dense.keys()
    quantised = {name for name, value in got.items() if isinstance(value, QuantWeight)}
    assert len(quantised) == svdquant_text.T5["num_layers"] * 7
    for name, value in got.items():
        if name in quantised:
            assert torch.allclose(effective(value), dense[name], atol=1e-6), name
            assert value.segments[0].scale.dtype == torch.float32  # what layers compute in
        else:
            assert value.dtype == dtype  # as the file has it: ComfyUI decides by it
            assert torch.equal(value.float(), dense[name])


def test_groups_are_padded_to_words_of_eight(tmp_path):
    """K = 1152: 9 groups of 128 in 16 rows of scales, of which 7 are padding."""
    weight = torch.randn(8, 1152, generator=torch.Generator().manual_seed(0))
    parts, dense = svdquant_text.awq_layer(weight)
    assert parts["scales"].shape == (16, 8)
    save_file({f"a.{n}": t.contiguous() for n, t in parts.items()}, tmp_path / "a.safetensors")
    _, got = values(tmp_path / "a.safetensors")
    assert torch.allclose(effective(got["a.weight"]), dense, atol=1e-6)
    for rows in (8, 18):  # one group short, groups of 64
        parts |= {n: torch.ones(rows, 8).half() for n in ("scales", "scaled_zeros")}
        save_file({f"a.{n}": t for n, t in parts.items()}, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match=r"layer a has scales F16.* the file is damaged"):
            values(tmp_path / "b.safetensors")


def test_comfy_kitchens_form_reads_to_its_dense_model(tmp_path):
    path = tmp_path / "qwen.safetensors"
    dense = svdquant_text.write_qwen(path)
    checkpoint, got = values(path)
    assert checkpoint.dialect == "comfy-kitchen"
    assert {layer.precision for layer in checkpoint.layers.values()} == {"int4", "awq"}
    assert got.keys() == dense.keys()
    for name, value in got.items():
        found = effective(value) if isinstance(value, QuantWeight) else value.float()
        assert (found - dense[name]).norm() <= 1e-5 * dense[name].norm(), name


def test_what_is_no_4_bit_text_encoder(tmp_path):
    save_file({"shared.weight": torch.zeros(4, 4)}, tmp_path / "plain.safetensors")
    assert detect_text(read_header(tmp_path / "plain.safetensors")) is None
    svdquant_models.write(tmp_path / "flux.safetensors", "flux", "nunchaku-1")
    with pytest.raises(CheckpointError, match="belongs to Slipstream SVDQuant Loader"):
        detect_text(read_header(tmp_path / "flux.safetensors"))
    svdquant_text.write_t5(tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=r"is a 4-bit text encoder.*SVDQuant CLIP Loader"):
        detect(read_header(tmp_path / "t5.safetensors"))


def test_a_layer_in_another_form_is_named(tmp_path):
    path = tmp_path / "qwen.safetensors"
    svdquant_text.write_qwen(path)
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    text = b'{"format": "float8_e4m3fn"}'
    tensors[f"{name}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{name} has comfy_quant format 'float8_e4m3fn'"):
        values(path)
