"""The rules of Nunchaku's strict loaders against diffusers' classes, at full width, and what
ComfyUI's detection makes of Qwen-Image-Edit-2511 and Layered files.
"""

import inspect
import json
import logging
from pathlib import Path

import nunchaku_rules
import pytest
import svdquant_models
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.run import run_log
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.config import ConvertConfig
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.header import Header, TensorEntry, read_header
from slipstream.backends.svdquant.metadata import metadata
from slipstream.backends.svdquant.plan import plan_conversion, target_tensors
from svdquant_networks import SIZES, quantised_model, sample

pytestmark = pytest.mark.usefixtures("comfy")
MARKER = "__index_timestep_zero__"
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "qk_norm": True,
    "dim": 3840,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
EDIT_2511 = {"default_ref_method": "index_timestep_zero"}
LAYERED = {"default_ref_method": "negative_index", "use_additional_t_cond": True}
MODELS = {  # name -> ComfyUI's class and what its detection finds in the 16-bit file
    "flux-dev": ("Flux", FLUX),
    "flux-schnell": ("FluxSchnell", FLUX | {"guidance_embed": False}),
    "qwen-image": ("QwenImage", QWEN),
    "edit-2511": ("QwenImage", QWEN | EDIT_2511),
    "layered": ("QwenImage", QWEN | LAYERED),
    "z-image": ("ZImage", Z_IMAGE),
}


def shapes_of(name, config):
    """Every tensor of the whole network, none of its weights."""
    import comfy.supported_models

    made = getattr(comfy.supported_models, name)(dict(config))
    made.unet_config.update(config)
    made.set_inference_dtype(torch.bfloat16, None)
    state = made.get_model({}, "", device="meta").diffusion_model.state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def header(specs, texts=None):
    entries, at = {}, 0
    for name, (dtype, shape) in specs.items():
        entries[name] = TensorEntry(dtype, tuple(shape), at, at)
    return Header(Path("model.safetensors"), entries, texts or {}, at)


def converted(model, precision):
    """The header of the file that Convert would write, from the plan it writes by."""
    source = header({n: ("BF16", shape) for n, shape in shapes_of(*MODELS[model]).items()})
    plan, config = plan_conversion(source), ConvertConfig(precision=precision)
    return header(target_tensors(plan, config), metadata(plan, source, config))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_strict_load_takes_the_whole_model(model, precision):
    assert nunchaku_rules.problems(converted(model, precision)) == []


@pytest.mark.parametrize("model", MODELS)
def test_the_rules_are_diffusers_classes_with_layers_replaced(model):
    """Every tensor that is not 4-bit, and the widths of those that are."""
    diffusers = pytest.importorskip("diffusers")
    file = converted(model, "int4")
    config = file.json("config")
    found = getattr(diffusers, config["_class_name"])
    known = set(inspect.signature(found.__init__).parameters)
    assert set(config) - {"_class_name"} <= known  # nothing that diffusers would ignore
    with torch.device("meta"):
        dense = {n: tuple(t.shape) for n, t in found.from_config(config).state_dict().items()}
    rules = nunchaku_rules.expected(config, file.json("quantization_config"), "int4")
    for name, (_, shape) in rules.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.qweight" not in rules:
            assert dense[name] == shape, name
        elif part == "qweight":
            rows = shape[0] * (4 if rules[name][0] == "I32" else 1)
            assert (rows, shape[1] * 2) == replaced(dense, layer), name
    kept = {n for n in rules if f"{n.rpartition('.')[0]}.qweight" not in rules}
    gone = {n for n in dense.keys() - kept if not is_replaced(n)}
    assert gone == set()


def replaced(dense, layer):
    """(rows, columns) of what a 4-bit layer stands for in diffusers' class."""
    owner, _, last = layer.rpartition(".")
    if last == "to_qkv":
        names = [f"{owner}.{n}" for n in ("to_q", "to_k", "to_v")]
    elif last == "add_qkv_proj":
        names = [f"{owner}.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")]
    elif layer.endswith("feed_forward.net.0.proj"):
        names = [layer.replace("net.0.proj", n) for n in ("w3", "w1")]
    elif layer.endswith("feed_forward.net.2"):
        names = [layer.replace("net.2", "w2")]
    elif last == "mlp_fc1":
        names = [f"{owner}.proj_mlp"]
    elif last in ("mlp_fc2", "to_out"):  # the two halves of proj_out's columns
        rows, columns = dense[f"{owner.removesuffix('.attn')}.proj_out.weight"]
        return (rows, rows if last == "to_out" else columns - rows)
    else:
        names = [layer]
    shapes = [dense[f"{name}.weight"] for name in names]
    return sum(shape[0] for shape in shapes), shapes[0][1]


FOUR_BIT = ("attn.to_", "attn.add_", "attention.to_", "ff.net", "ff_context.net", "_mlp.net")
ALSO = ("feed_forward.w", ".norm1", "single_transformer_blocks", "_mod.1")


def is_replaced(name):
    return "norm_q" not in name and any(part in name for part in (*FOUR_BIT, *ALSO))


# ---- what ComfyUI makes of a file ----
def qwen_file(folder, name, config):
    path = folder / name
    svdquant_models.write(path, "qwen-image", "nunchaku-2", **SIZES["qwen-image"])
    save_file(load_file(path), path, metadata={"config": json.dumps(config)})
    return path


def detected(path):
    """ComfyUI's own detection on the state that the loader hands it."""
    import comfy.model_detection

    state = dict(assemble(detect(read_header(path)), torch.float32))
    return comfy.model_detection.detect_unet_config(state, "")


def test_comfyui_detects_2511_by_the_files_config(tmp_path):
    plain = detected(qwen_file(tmp_path, "a.safetensors", {}))
    assert "default_ref_method" not in plain
    got = detected(qwen_file(tmp_path, "b.safetensors", {"zero_cond_t": True}))
    assert got == plain | EDIT_2511


def test_the_loader_says_what_only_the_name_says(tmp_path, caplog):
    path = qwen_file(tmp_path, "svdq-int4_r32-qwen-image-edit-2511.safetensors", {})
    with caplog.at_level(logging.WARNING, "slipstream"):
        model = quantised_model("qwen-image", path, "dequant")
    assert sum("says 2511" in r.message for r in caplog.records) == 1
    sample(model, "qwen-image")
    notes = run_log(model).latest().notes
    assert any("FluxKontextMultiReferenceLatentMethod" in note for note in notes)
