"""4-bit text encoders through ComfyUI's own loader, tokenizers and nodes, against dense ones."""

import logging

import pytest
import svdquant_models
import svdquant_text
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.host_text import clip_types, load_clip
from svdquant_networks import rel

pytestmark = pytest.mark.usefixtures("comfy")
PROMPT = "a small sailing boat rounding a rocky headland at first light"
NUM_T5 = svdquant_text.T5["num_layers"] * 7
NUM_QWEN = svdquant_text.QWEN["num_hidden_layers"] * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text_encoders")


@pytest.fixture(scope="module")
def t5(folder):
    path = folder / "awq-int4-t5xxl.safetensors"
    return path, svdquant_text.write_t5(path)


@pytest.fixture(scope="module")
def clip_l(folder):
    path = folder / "clip_l.safetensors"
    return path, svdquant_text.write_clip_l(path)


@pytest.fixture(scope="module")
def qwen(folder):
    path = folder / "qwen_2.5_vl_7b_svdquant.safetensors"
    return path, svdquant_text.write_qwen(path)


@pytest.fixture(scope="module")
def dense_qwen_output(qwen):
    return encode(load_dense(qwen[1], type="qwen_image"))[0]


def load(*paths, type="flux", **config):
    files = [str(path) for path in paths]
    return load_clip(files, type, config, model_options=svdquant_text.sizes())


def load_dense(*states, type="flux"):
    """ComfyUI's loader on the models that the files stand for, everything in fp32."""
    import comfy.sd

    return comfy.sd.load_text_encoder_state_dicts(
        [{n: t.clone() for n, t in state.items()} for state in states],
        clip_type=comfy.sd.CLIPType[type.upper()],
        model_options={**svdquant_text.sizes(), "dtype": torch.float32},
    )


def encode(clip, prompt=PROMPT):
    cond, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return cond.float(), pooled


# ---- what comes out ----
def test_nunchakus_t5_with_a_16_bit_clip_l_is_the_dense_model(t5, clip_l):
    clip = load(clip_l[0], t5[0])
    dense = load_dense(clip_l[1], t5[1])
    assert len(quantised_layers(clip.cond_stage_model)) == NUM_T5
    got, pooled = encode(clip)
    wanted, wanted_pooled = encode(dense)
    assert got.shape == wanted.shape == (1, 256, svdquant_text.T5["d_model"])
    assert rel(got, wanted) < 1e-5
    assert rel(pooled, wanted_pooled) < 1e-5
    assert rel(encode(clip, "something else")[0], got) > 0.1
    # the order of the files is ComfyUI's affair
    assert torch.equal(encode(load(t5[0], clip_l[0]))[0], got)


def test_t5_alone(t5):
    """As ComfyUI has it: another type, other padding."""
    clip = load(t5[0], type="stable_audio")
    got, _ = encode(clip)
    wanted, _ = encode(load_dense(t5[1], type="stable_audio"))
    assert rel(got, wanted) < 1e-5


def test_the_embedding_may_have_its_other_name(t5, folder):
    path = folder / "embed_tokens.safetensors"
    dense = svdquant_text.write_t5(path, embedding="encoder.embed_tokens.weight")
    assert torch.equal(dense["shared.weight"], t5[1]["shared.weight"])
    got, wanted = (encode(load(p, type="stable_audio"))[0] for p in (path, t5[0]))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        ({}, 1e-5),  # fp32 and unpacked weights, as ComfyUI computes text encoders
        ({"backend": "dequant", "dtype": "bf16"}, 0.03),
        ({"backend": "kitchen"}, 0.3),  # inputs of the w4a4 layers rounded to 4 bits
        pytest.param({"backend": "reference"}, 0.3, marks=pytest.mark.full),
    ],
)
def test_comfy_kitchens_qwen_is_the_dense_model(qwen, dense_qwen_output, config, bound):
    clip = load(qwen[0], type="qwen_image", **config)
    assert len(quantised_layers(clip.cond_stage_model)) == NUM_QWEN
    error = rel(encode(clip)[0], dense_qwen_output)
    assert error < bound
    assert (error > 0.01) == (bound > 0.1)  # rounding of inputs is there where it is asked for


def test_16_bit_parts_keep_the_dtype_of_the_file(t5):
    clip = load(t5[0], type="stable_audio")
    stack = clip.cond_stage_model.t5base.transformer
    assert stack.shared.weight.dtype == torch.float16
    assert stack.encoder.final_layer_norm.weight.dtype == torch.float16


# ---- as an ordinary CLIP ----
def lora(names, rank=4):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[f"text_encoders.{name}.lora_down.weight"] = torch.randn(
            rank, columns, generator=generator
        )
        tensors[f"text_encoders.{name}.lora_up.weight"] = (
            torch.randn(rows, rank, generator=generator) * 0.1
        )
        tensors[f"text_encoders.{name}.alpha"] = torch.tensor(3.0)
    return tensors


def with_lora(clip, tensors, strength):
    import comfy.sd

    patched = comfy.sd.load_lora_for_models(None, clip, dict(tensors), 0.0, strength)[1]
    assert len(patched.patcher.patches) == len(tensors) // 3
    return patched


T5_LORA = {
    "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (128, 128),
    "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wi_0": (256, 128),
    "t5xxl.transformer.encoder.block.2.layer.1.DenseReluDense.wo": (128, 256),
    "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (128, 64),
}
QWEN_LORA = {
    "qwen25_7b.transformer.model.layers.0.self_attn.q_proj": (512, 256),
    "qwen25_7b.transformer.model.layers.1.mlp.down_proj": (256, 384),
}


def test_a_lora_equals_the_merge_into_the_dense_model(t5, clip_l, qwen):
    cases = (
        (load(clip_l[0], t5[0]), load_dense(clip_l[1], t5[1]), T5_LORA),
        (load(qwen[0], type="qwen_image"), load_dense(qwen[1], type="qwen_image"), QWEN_LORA),
    )
    for clip, dense, names in cases:
        base, pooled = encode(clip)
        tensors = lora(names)
        got, got_pooled = encode(with_lora(clip, tensors, 0.7))
        wanted, wanted_pooled = encode(with_lora(dense, tensors, 0.7))
        assert rel(wanted, base) > 0.01
        assert rel(got, wanted) < 1e-5
        if pooled is not None:  # of the 16-bit CLIP-L, where ComfyUI merges in 16 bits
            assert rel(got_pooled, wanted_pooled) < 5e-4
        assert torch.equal(encode(clip)[0], base)  # taken off, bit for bit


def test_set_last_layer(t5):
    clip, dense = (
        c.clone()
        for c in (load(t5[0], type="stable_audio"), load_dense(t5[1], type="stable_audio"))
    )
    last = encode(clip)[0]
    for one in (clip, dense):
        one.clip_layer(-2)
    assert rel(encode(clip)[0], encode(dense)[0]) < 1e-5
    assert rel(encode(clip)[0], last) > 0.01


def test_a_clone_without_dynamic_vram_keeps_loras(t5):
    clip = load(t5[0], type="stable_audio")
    name = "t5base.transformer.encoder.block.0.layer.0.SelfAttention.q"
    tensors = lora({name: (128, 128)})
    wanted = encode(with_lora(clip, tensors, 1.0))[0]
    function, (paths, kind, _) = clip.patcher.cached_patcher_init
    assert (paths, kind) == ([str(t5[0])], "stable_audio")
    assert hasattr(clip.patcher, "quantised_layer")
    clone = clip.clone(disable_dynamic=True)
    assert hasattr(clone.patcher, "quantised_layer")
    assert torch.equal(encode(with_lora(clone, tensors, 1.0))[0], wanted)
    assert function.__name__ == "load_clip_patcher"


def test_the_log_says_layers_and_bytes(t5, clip_l, caplog):
    with caplog.at_level(logging.INFO, "slipstream"):
        load(clip_l[0], t5[0])
    (line,) = [r.getMessage() for r in caplog.records if "4-bit layers" in r.getMessage()]
    assert f"{t5[0].name}: {NUM_T5} 4-bit layers (Nunchaku text encoder), " in line
    assert f"{clip_l[0].name}: as ComfyUI loads it" in line


def test_comfyui_detects_t5_xxl_by_a_quantised_weight(folder):
    """Detection reads shapes; at full width it needs no more than this one."""
    import comfy.sd
    from slipstream.backends.svdquant.layout import wrap
    from slipstream.backends.svdquant.weight import Facts, Segment, whole

    facts = Facts("awq", 0, 10240, 0, 128)
    codes = torch.zeros(10240, 64, dtype=torch.int8)
    scale = torch.ones(2, 10240)
    weight = wrap(whole(Segment(facts, codes, scale, zeros=scale)), torch.float32)
    state = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": weight}
    assert comfy.sd.detect_te_model(state) is comfy.sd.TEModel.T5_XXL


def test_types_are_comfyuis_own():
    import nodes

    theirs = {
        name
        for loader in (nodes.CLIPLoader, nodes.DualCLIPLoader)
        for name in loader.INPUT_TYPES()["required"]["type"][0]
    }
    assert theirs <= set(clip_types())


# ---- mistakes ----
def refused(sentence, *paths, **how):
    with pytest.raises(CheckpointError, match=sentence):
        load(*paths, **how)


def test_files_that_are_something_else(t5, clip_l, qwen, folder):
    refused("clip_l.safetensors: no 4-bit layers in a form .* Use Load CLIP", clip_l[0])
    svdquant_models.write(folder / "flux.safetensors", "flux", "nunchaku-1")
    refused("no text encoder .* belongs to Slipstream SVDQuant Loader", folder / "flux.safetensors")
    with pytest.raises(CheckpointError, match=r"is a 4-bit text encoder.*SVDQuant CLIP Loader"):
        load_svdquant(str(t5[0]))
    refused(f"takes 0 of its {NUM_QWEN} 4-bit layers. Choose the type", qwen[0], clip_l[0])


def test_damaged_and_mixed_files(t5, clip_l, qwen, folder):
    def changed(source, change):
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, folder / "changed.safetensors")
        return folder / "changed.safetensors"

    layer = "encoder.block.1.layer.0.SelfAttention.v"
    path = changed(t5[0], lambda t: t.pop(f"{layer}.scales"))
    refused(f"layer {layer} lacks scales: the file is truncated", path, clip_l[0])

    def wide(tensors):
        tensors[f"{layer}.scales"] = torch.ones(16, 128).half()

    refused(f"layer {layer} has scales F16", changed(t5[0], wide), clip_l[0])

    def gone(tensors):
        for part in ("qweight", "scales", "scaled_zeros"):
            tensors.pop(f"{layer}.{part}")

    path = changed(t5[0], gone)
    refused(r"lacks 1 layers of the text encoder \(t5xxl.transformer.encoder", path, clip_l[0])

    def nan(tensors):
        tensors[f"{layer}.scales"][0, 0] = float("nan")

    refused("NaN or infinite values", changed(t5[0], nan), clip_l[0])

    def fp8(tensors):
        text = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        tensors["text_model.encoder.layers.0.mlp.fc1.comfy_quant"] = text

    refused("quantised in a form of ComfyUI's own", changed(clip_l[0], fp8), t5[0])

    def both(tensors):
        name = "model.layers.0.mlp.up_proj.comfy_quant"
        tensors[name] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    refused("comfy_quant format 'float8_e4m3fn'", changed(qwen[0], both), type="qwen_image")
