"""A list of prompts through the API: batches, pictures with names, files, sentences."""

import json

import pytest
import queue_client

TEXTS = ("a red fox", "a lighthouse, " + "very " * 90 + "tall", "two boats at night")
SEED = 7100


def prompt_of(*, kind="flux", steps=1, **widgets):
    """SlipstreamPromptBatch to a digest of each batch's latent."""
    return {
        "model": {
            "class_type": "SlipstreamTestModel",
            "inputs": {"family": kind, "heads": 1, "seed": 0},
        },
        "clip": {"class_type": "SlipstreamTestClip", "inputs": {"kind": kind}},
        "negative": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["clip", 0], "text": "blurry"},
        },
        "batch": {
            "class_type": "SlipstreamPromptBatch",
            "inputs": {"clip": ["clip", 0], **widgets},
        },
        "latent": {
            "class_type": "EmptySD3LatentImage" if kind == "flux" else "EmptyLatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": ["batch", 1]},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["batch", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": SEED,
                "steps": steps,
                "cfg": 5.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "digest": {"class_type": "SlipstreamTestDigest", "inputs": {"samples": ["sampler", 0]}},
        "prompts": {"class_type": "PreviewAny", "inputs": {"source": ["batch", 2]}},
    }


def saving(prompt, folder, *, vae="taef1"):
    """The same prompt with pictures under output/<folder>/<name>."""
    return prompt | {
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": vae}},
        "decode": {
            "class_type": "VAEDecode",
            "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]},
        },
        "rebatch": {
            "class_type": "RebatchImages",
            "inputs": {"images": ["decode", 0], "batch_size": 1},
        },
        "path": {
            "class_type": "StringConcatenate",
            "inputs": {"string_a": folder, "string_b": ["batch", 3], "delimiter": "/"},
        },
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["rebatch", 0], "filename_prefix": ["path", 0]},
        },
    }


@pytest.fixture(scope="module")
def server(server, models):
    import tiny

    tiny.write_preview_vae(models / "vae_approx", "taesd", latent_channels=4)
    return server


def pictures(server, result):
    """File name -> bytes of what SaveImage wrote."""
    found = {}
    for one in result.outputs["save"]["images"]:
        assert one["type"] == "output"
        path = server.base / "output" / one["subfolder"] / one["filename"]
        found[one["filename"]] = path.read_bytes()
    return found


def test_pictures_are_named_and_each_is_its_prompts(server):
    """Three prompts of unequal length in one batch, and the same rows with one prompt for all."""
    together = saving(prompt_of(kind="sd15", text="\n".join(TEXTS)), "three", vae="taesd")
    result = queue_client.run(server, together)
    (digest,) = result.outputs["digest"]["text"]
    assert "shape=[(3, 4, 16, 16)]" in digest
    saved = pictures(server, result)
    names = ["001_a_red_fox", "002_a_lighthouse", "003_two_boats_at_night"]
    assert [name[: len(n)] for name, n in zip(saved, names, strict=True)] == names
    assert all(one["subfolder"] == "three" for one in result.outputs["save"]["images"])
    assert "3 prompts in 1 batch of 3" in result.progress_text["batch"]
    for row, text in enumerate(TEXTS):
        alone = saving(prompt_of(kind="sd15", text=text), f"alone{row}", vae="taesd")
        alone["batch"]["inputs"]["text"] = "\n".join([text] * 3)
        own = list(pictures(server, queue_client.run(server, alone)).values())
        ours = list(saved.values())
        assert close(own[row], ours[row])
        assert not close(own[row], ours[(row + 1) % 3]), "the test is blind"


def close(one, other):
    """Whether two PNGs show the same picture, but for rounding to 8 bits."""
    import io

    import numpy
    from PIL import Image

    pixels = [
        numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in (one, other)
    ]
    return abs(pixels[0] - pixels[1]).max() <= 1


def test_batches_run_one_after_the_other(server):
    text = "\n".join(f"a fox in the year {2000 + n}" for n in range(5))
    prompt = saving(prompt_of(text=text, prompts_per_batch=2), "five")
    result = queue_client.run(server, prompt)
    shapes = [digest.split("shape=")[1][:11] for digest in result.outputs["digest"]["text"]]
    assert shapes == ["[(2, 16, 16", "[(2, 16, 16", "[(1, 16, 16"]
    assert len(pictures(server, result)) == 5
    assert result.outputs["prompts"]["text"] == text.split("\n")
    assert "5 prompts in 3 batches of 2, 2, 1." in result.progress_text["batch"]


def test_a_file_is_read_again_when_it_changes(server):
    path = server.base / "input" / "list.txt"
    path.write_text("\ufeff# foxes\r\na red fox\r\n", encoding="utf-8")

    def prompts():
        result = queue_client.run(server, prompt_of(text="", file="list.txt"))
        return result.outputs["prompts"]["text"], "batch" in result.cached

    assert prompts() == (["a red fox"], False)
    assert prompts() == (["a red fox"], True)
    path.write_text("a grey fox\n", encoding="utf-8")
    assert prompts() == (["a grey fox"], False)


def test_wrong_files_are_refused_before_the_run(server):
    (server.base / "secret.txt").write_text("secret")
    for name, sentence in (("gone.txt", "not in ComfyUI"), ("../secret.txt", "outside of ComfyUI")):
        with pytest.raises(queue_client.PromptRejected) as refused:
            queue_client.run(server, prompt_of(text="a", file=name))
        assert sentence in str(refused.value) or sentence in json.dumps(vars(refused.value))


def test_no_prompt_is_a_sentence(server):
    with pytest.raises(queue_client.PromptFailed, match="There is no prompt: write one a line"):
        queue_client.run(server, prompt_of(text="# nothing\n\n"))


def test_a_prompt_saved_without_the_optional_widgets_runs(server):
    result = queue_client.run(server, prompt_of(text="a fox\na dog"))
    assert result.outputs["prompts"]["text"] == ["a fox", "a dog"]
