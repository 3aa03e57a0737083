"""SDXL: every name of the real UNet, LoRA under both of its names, calibration to a new file."""

from pathlib import Path

import pytest
import svdquant_models
import tiny
import torch
from safetensors.torch import save_file
from slipstream.backends.svdquant.calibrate import apply_calibrate
from slipstream.backends.svdquant.config import ConvertConfig
from slipstream.backends.svdquant.convert import convert
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.families.sdxl import SDXL
from slipstream.backends.svdquant.header import Header, TensorEntry, read_header
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.kernels import Kitchen, kitchen
from slipstream.backends.svdquant.plan import plan_conversion, target_tensors
from slipstream.backends.svdquant.statistics import load_statistics
from svdquant_loras import with_lora
from svdquant_networks import SIZES, dense_model, in_memory, quantised_model, rel, sample

pytestmark = pytest.mark.usefixtures("comfy")
UNET = {  # what ComfyUI's detection makes of an SDXL file
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "context_dim": 2048,
    "num_head_channels": 64,
    "num_heads": -1,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
}
FOUR_BIT = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
PARTS = ("qweight", "wscales", "smooth", "smooth_orig", "lora_down", "lora_up")


@pytest.fixture(scope="module")
def shapes():
    """Every tensor of the whole UNet, none of its weights."""
    return shapes_of("SDXL")


def shapes_of(name, **sizes):
    """Of the class that detection must find in them."""
    import comfy.model_detection
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)(UNET | sizes)
    config.unet_config.update(UNET | sizes)
    config.set_inference_dtype(torch.float16, None)
    state = config.get_model({}, "", device="meta").diffusion_model.state_dict()
    found = comfy.model_detection.model_config_from_unet(state, "")
    assert type(found).__name__ == name
    return {name: tuple(value.shape) for name, value in state.items()}


def header(specs):
    entries, at = {}, 0
    for name, (dtype, shape) in specs.items():
        size = torch.Size(shape).numel() * {"F16": 2, "BF16": 2, "F32": 4}.get(dtype, 1)
        entries[name] = TensorEntry(dtype, tuple(shape), at, at + size)
        at += size
    return Header(Path("sdxl.safetensors"), entries, {}, at)


def written(shapes, precision="int4"):
    prefixed = {f"model.diffusion_model.{n}": ("F16", shape) for n, shape in shapes.items()}
    plan = plan_conversion(header(prefixed))
    return target_tensors(plan, ConvertConfig(precision=precision))


def nunchaku_names(diffusers_names, parts=PARTS):
    """The keys that Nunchaku's strict loader wants, from diffusers' names of the dense UNet."""
    names = set()
    for name in diffusers_names:
        owner, _, kind = name.rpartition(".")
        if owner.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
            names |= {f"{owner[:-1]}qkv.{part}" for part in parts}
        elif ".transformer_blocks." in name and owner.endswith(FOUR_BIT):
            names |= {f"{owner}.{part}" for part in parts} if kind == "weight" else {name}
        else:
            names.add(name)
    return names


def test_every_name_of_the_whole_unet(shapes):
    """ComfyUI's own map of diffusers' names is the judge."""
    import comfy.utils

    theirs = {
        name: ours
        for name, ours in comfy.utils.unet_to_diffusers(UNET).items()
        if ours in shapes and not name.startswith("class_embedding.")
    }
    assert sorted(theirs.values()) == sorted(shapes)
    specs = written(shapes)
    assert set(specs) == nunchaku_names(theirs)
    assert {n: s for n, (_, s) in specs.items() if n in theirs and "lora" not in n} == {
        name: shapes[ours] for name, ours in theirs.items() if name in specs
    }
    checkpoint = detect(header(specs))
    assert (checkpoint.family.id, checkpoint.dialect) == ("sdxl", "nunchaku-1")
    assert len(checkpoint.layers) == 70 * 6
    fp4 = written(shapes, "nvfp4")
    assert set(fp4) == nunchaku_names(theirs, (*PARTS, "wcscales"))
    assert not any(name.endswith("wtscale") for name in fp4)


def test_diffusers_builds_the_unet_of_the_config(shapes):
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

    config = SDXL.diffusers_config(shapes)
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(config).state_dict()
    specs = written(shapes)
    assert set(specs) == nunchaku_names(state)
    for name, value in state.items():
        assert name not in specs or specs[name][1] == tuple(value.shape), name


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    return path, svdquant_models.write(path, "sdxl", "nunchaku-1", **SIZES["sdxl"])


LAYERS = (  # ComfyUI's and diffusers' names of the same layers, rows, columns
    ("input_blocks_7_1_transformer_blocks_1", "down_blocks_2_attentions_0_transformer_blocks_1"),
    ("middle_block_1_transformer_blocks_0", "mid_block_attentions_0_transformer_blocks_0"),
    ("output_blocks_3_1_transformer_blocks_0", "up_blocks_1_attentions_0_transformer_blocks_0"),
)
INNER = {
    "attn1_to_q": (128, 128),
    "attn1_to_v": (128, 128),
    "attn1_to_out_0": (128, 128),
    "attn2_to_q": (128, 128),
    "attn2_to_k": (128, 768),
    "ff_net_0_proj": (1024, 128),
    "ff_net_2": (128, 512),
}


def lora(names):
    """A kohya LoRA over the layers, under ComfyUI's (0) or diffusers' (1) names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in LAYERS:
        for inner, (rows, columns) in INNER.items():
            key = f"lora_unet_{block[names]}_{inner}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(6.0)
    return tensors


def test_kohya_loras_equal_the_merge_into_the_dense_model(file):
    path, dense = file
    exact, plain = quantised_model("sdxl", path, "dequant"), dense_model("sdxl", dense)
    base, base_plain = sample(exact, "sdxl"), sample(plain, "sdxl")
    delta = sample(with_lora(plain, lora(0), 0.8), "sdxl") - base_plain
    assert delta.norm() > 0.01 * base_plain.norm()
    for names in (0, 1):
        got = sample(with_lora(exact, lora(names), 0.8), "sdxl") - base
        assert rel(got, delta) < 1e-3
    assert torch.equal(sample(exact, "sdxl"), base)  # taken off again, bit for bit


def test_q_k_v_of_self_attention_quantise_their_input_once(file, monkeypatch):
    pytest.importorskip("comfy_kitchen")
    quantised, computed = [], []
    quantise, run = kitchen._quantise, Kitchen.run
    monkeypatch.setattr(kitchen, "_quantise", lambda *a: quantised.append(1) or quantise(*a))
    monkeypatch.setattr(Kitchen, "run", lambda *a, **k: computed.append(1) or run(*a, **k))
    model = quantised_model("sdxl", file[0], "kitchen", "bf16")
    sample(model, "sdxl")
    blocks = len(quantised_layers(model.model)) // 8
    assert (len(computed), len(quantised)) == (8 * blocks, 6 * blocks)


def test_calibrate_convert_load(file, tmp_path):
    dense = {name: tensor.bfloat16() for name, tensor in file[1].items()}
    source, recorded = tmp_path / "sdxl.safetensors", tmp_path / "calibration.safetensors"
    save_file({f"model.diffusion_model.{n}": t.contiguous() for n, t in dense.items()}, source)
    model = in_memory("sdxl", {n: t.float() for n, t in dense.items()})
    wanted = sample(model, "sdxl")
    assert torch.equal(sample(apply_calibrate(model, recorded), "sdxl"), wanted)
    statistics = load_statistics(recorded)
    target = convert(
        source, tmp_path / "svdq.safetensors", ConvertConfig(rank=32), statistics=statistics
    )
    loaded = quantised_model("sdxl", target, "dequant")
    layers = {n.removeprefix("diffusion_model.") for n in quantised_layers(loaded.model)}
    assert layers == set(statistics.layers)
    assert len(detect(read_header(target)).layers) == len(layers) * 6 // 8
    assert rel(sample(loaded, "sdxl"), wanted) < 0.05


REFINER = {
    "model_channels": 384,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
    "context_dim": 1280,
    "adm_in_channels": 2560,
}
SSD_1B = {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    "transformer_depth_middle": -1,
}


def test_other_unets_are_no_sdxl(tmp_path):
    with pytest.raises(ValueError, match=r"knows FLUX\.1, Qwen-Image, Z-Image, SDXL; this model"):
        apply_calibrate(tiny.load("sd15"), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not part of SDXL: this variant cannot be"):
        written(shapes_of("SDXLRefiner", **REFINER))
    with pytest.raises(CheckpointError, match="of a family that cannot be converted"):
        written(shapes_of("SSD1B", **SSD_1B))
