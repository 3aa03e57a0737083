"""SVDQuant through a real server's queue: every dialect, LoRA, calibrate and convert, mistakes."""

import json

import pytest
import queue_client
import svdquant_models
import svdquant_text
import torch
from safetensors.torch import load_file, save_file
from smoke_prompt import digest, flux_prompt

TINY = "tiny_flux_svdquant.safetensors"
SIZES = {"depth": 2, "single": 3, "context": 768, "vec": 768}


def loaded(name, *, seed, steps=2, **widgets):
    """The smoke prompt on an SVDQuant file, with the report as JSON."""
    prompt = flux_prompt(seed=seed, steps=steps)
    prompt["model"] = {
        "class_type": "SlipstreamSVDQuantLoader",
        "inputs": {"model_name": name, "backend": "auto", **widgets},
    }
    return reported(prompt, "model")


def reported(prompt, model):
    prompt["sampler"]["inputs"]["model"] = [model, 0]
    prompt["report"] = {
        "class_type": "SlipstreamReport",
        "inputs": {"latent": ["sampler", 0], "model": [model, 0]},
    }
    prompt["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 3]}}
    prompt["digest"]["inputs"]["samples"] = ["report", 0]
    return saved(prompt)


def saved(prompt):
    prompt["latent_file"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["sampler", 0], "filename_prefix": "svdquant"},
    }
    return prompt


def section(result, name="svdquant"):
    return json.loads(result.outputs["json"]["text"][0])[name]


def latent(server, result):
    (file,) = result.outputs["latent_file"]["latents"]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def rel(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folder(models):
    return models / "diffusion_models"


DIALECTS = [
    ("nunchaku-1", "int4", "kitchen"),
    ("nunchaku-2", "int4", "kitchen"),
    ("nunchaku-lite", "int4", "kitchen"),
    ("comfy-kitchen", "int4", "kitchen"),
    ("nunchaku-1", "nvfp4", "dequant"),
]


@pytest.mark.parametrize(("dialect", "precision", "backend"), DIALECTS)
def test_every_dialect_samples(server, folder, dialect, precision, backend):
    """Near the dense model it stands for, which the same server samples."""
    name = f"svdq-{dialect}-{precision}.safetensors"
    dense = svdquant_models.write(folder / name, "flux", dialect, precision=precision, **SIZES)
    save_file({k: v.contiguous() for k, v in dense.items()}, folder / f"dense-{name}")
    plain = saved(flux_prompt(seed=301, steps=2))
    plain["model"]["inputs"]["unet_name"] = f"dense-{name}"
    wanted = latent(server, queue_client.run(server, plain))
    result = queue_client.run(server, loaded(name, seed=301))
    assert section(result)["dialect"] == dialect
    assert section(result)["backend"] == backend
    assert section(result)["layers"] == 2 * 10 + 3 * 3
    error = rel(latent(server, result), wanted)
    assert error < 0.05, f"{error:.3f} with 4-bit inputs"
    exact = queue_client.run(server, loaded(name, seed=301, backend="dequant", dtype="fp32"))
    assert rel(latent(server, exact), wanted) < 1e-5


def test_the_model_is_cached_and_every_run_is_its_own(server):
    first = queue_client.run(server, loaded(TINY, seed=311))
    second = queue_client.run(server, loaded(TINY, seed=312))
    assert "model" in second.cached
    assert digest(first) != digest(second)
    assert section(first) == section(second)
    assert digest(queue_client.run(server, loaded(TINY, seed=311, steps=2))) == digest(first)


def test_lora_node_and_its_removal(server, folder, models):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for key, rows, columns in (
        ("transformer_blocks.0.attn.to_q", 128, 128),
        ("single_transformer_blocks.1.proj_out", 128, 640),
    ):
        lora[f"transformer.{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 8
        lora[f"transformer.{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 8
    (models / "loras").mkdir(exist_ok=True)
    save_file(lora, models / "loras" / "tiny_flux_lora.safetensors")
    before = digest(queue_client.run(server, loaded(TINY, seed=321)))

    def with_lora(strength):
        prompt = loaded(TINY, seed=321)
        prompt["lora"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {
                "model": ["model", 0],
                "lora_name": "tiny_flux_lora.safetensors",
                "strength_model": strength,
            },
        }
        return queue_client.run(server, reported(prompt, "lora"))

    on = with_lora(1.0)
    assert section(on)["lora_layers"] == 2
    assert digest(on) != before
    assert digest(with_lora(0.5)) not in (before, digest(on))
    assert digest(queue_client.run(server, loaded(TINY, seed=321))) == before


def test_calibrate_then_convert_then_load(server, folder):
    plain = flux_prompt(seed=331, steps=2)
    wanted = digest(queue_client.run(server, plain))
    prompt = flux_prompt(seed=331, steps=2)
    prompt["calibrate"] = {
        "class_type": "SlipstreamSVDQuantCalibrate",
        "inputs": {"model": ["model", 0], "name": "server test"},
    }
    reported(prompt, "calibrate")
    prompt["convert"] = {
        "class_type": "SlipstreamSVDQuantConvert",
        "inputs": {
            "model_name": "tiny_flux.safetensors",
            "precision": "int4",
            "statistics": "server test",
            "file_name": "converted",
            "after": ["report", 0],
        },
    }
    prompt["file"] = {"class_type": "PreviewAny", "inputs": {"source": ["convert", 0]}}
    result = queue_client.run(server, prompt)
    assert digest(result) == wanted  # recording changes nothing
    assert section(result, "svdquant_calibrate")["layers"] == 2 * 8 + 3 * 2
    assert result.outputs["file"]["text"] == ["converted.safetensors"]
    assert "model.calibrate" not in load_file(folder / "converted.safetensors")
    out = queue_client.run(server, loaded("converted.safetensors", seed=331))
    assert section(out)["dialect"] == "nunchaku-1"
    error = rel(latent(server, out), latent(server, result))
    assert error < 0.15, f"{error:.3f} with 4-bit weights and inputs"
    prompt["convert"]["inputs"]["search"] = True  # another prompt, the same file name
    with pytest.raises(queue_client.PromptFailed, match="exists already: choose another file"):
        queue_client.run(server, prompt)


def test_inspect_shows_its_text(server):
    prompt = {
        "inspect": {
            "class_type": "SlipstreamSVDQuantInspect",
            "inputs": {"model_name": TINY},
        },
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["inspect", 0]}},
    }
    text = queue_client.run(server, prompt).outputs["text"]["text"][0]
    assert "Family: FLUX.1. Dialect: Nunchaku (lora_down, smooth)." in text
    assert "Precision: int4, rank 32" in text
    assert "kitchen: yes" in text
    assert "auto picks kitchen" in text


MISTAKES = [
    ("tiny_flux.safetensors", {}, "is not an SVDQuant checkpoint (no *.qweight"),
    (TINY, {"precision": "nvfp4"}, "precision=nvfp4 was requested. Choose auto."),
    (TINY, {"rank": 64}, "rank=64 was requested. Choose 0."),
    (TINY, {"backend": "nunchaku"}, "backend nunchaku cannot run this model here"),
]


@pytest.mark.parametrize(("name", "widgets", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(server, name, widgets, sentence):
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, loaded(name, seed=341, **widgets))
    assert caught.value.node_type == "SlipstreamSVDQuantLoader"
    assert sentence in str(caught.value)


def test_calibration_names_and_models(server):
    prompt = flux_prompt(seed=351, steps=1)
    prompt["calibrate"] = {
        "class_type": "SlipstreamSVDQuantCalibrate",
        "inputs": {"model": ["model", 0], "name": "../up"},
    }
    with pytest.raises(queue_client.PromptFailed, match="is no name for a calibration"):
        queue_client.run(server, reported(prompt, "calibrate"))
    prompt = loaded(TINY, seed=351)
    prompt["calibrate"] = {
        "class_type": "SlipstreamSVDQuantCalibrate",
        "inputs": {"model": ["model", 0], "name": "four bit"},
    }
    with pytest.raises(queue_client.PromptFailed, match="4-bit already: calibrate the 16-bit"):
        queue_client.run(server, reported(prompt, "calibrate"))


# ---- text encoders ----
def test_the_clip_loader_is_there_with_comfyuis_types(server):
    schema = server.get("/object_info")["SlipstreamSVDQuantCLIPLoader"]
    assert schema["output"] == ["CLIP"]
    types = combo(schema["input"]["required"]["type"])
    info = server.get("/object_info")
    for loader in ("CLIPLoader", "DualCLIPLoader"):
        assert set(combo(info[loader]["input"]["required"]["type"])) <= set(types)


def combo(one):
    """The options of a widget, in either form of ComfyUI's schema."""
    return one[0] if isinstance(one[0], list) else one[1]["options"]


def test_a_file_without_4_bit_layers_is_one_sentence(server, models):
    (models / "text_encoders").mkdir(exist_ok=True)
    plain = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 4)}
    save_file(plain, models / "text_encoders" / "plain_clip.safetensors")
    prompt = {
        "clip": {
            "class_type": "SlipstreamSVDQuantCLIPLoader",
            "inputs": {"clip_name1": "plain_clip.safetensors", "type": "flux"},
        },
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["clip", 0]}},
    }
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert caught.value.node_type == "SlipstreamSVDQuantCLIPLoader"
    assert "no 4-bit layers in a form that this loader knows" in str(caught.value)
    assert "Use Load CLIP" in str(caught.value)


def test_a_4_bit_t5_encodes_and_the_node_says_what_it_is(server, models):
    """T5 base: the smallest text encoder that ComfyUI detects without help."""
    (models / "text_encoders").mkdir(exist_ok=True)
    num_layers = svdquant_text.write_t5_base(models / "text_encoders" / "t5_base_awq.safetensors")
    prompt = flux_prompt(seed=351, steps=1)
    prompt["clip"] = {
        "class_type": "SlipstreamSVDQuantCLIPLoader",
        "inputs": {"clip_name1": "t5_base_awq.safetensors", "type": "stable_audio"},
    }
    prompt["text"] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": ["clip", 0], "text": "a small sailing boat"},
    }
    result = queue_client.run(server, prompt)
    assert f"t5_base_awq.safetensors: {num_layers} 4-bit layers" in result.progress_text["clip"]
    other = prompt | {"text": prompt["text"] | {"inputs": {"clip": ["clip", 0], "text": "a cat"}}}
    again = queue_client.run(server, other)
    assert "clip" in again.cached
    assert digest(again) != digest(result)
