"""SlipstreamReport on real sampling runs: the right run, ComfyUI's caching, nested latents."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from slipstream.backends.report import NO_RUN, NO_TECHNIQUE, OTHER_LATENT, Grid, Section
from slipstream.backends.run import attach


class Counting:
    """A technique that counts its model calls into a section with a figure."""

    name = "counting"

    def start(self, run):
        return CountingState(run)


class CountingState:
    def __init__(self, run):
        self.run = run

    def section(self):
        figure = Grid("Calls", ("block/0",), ("0", "1"), (("on", "on"),), {"on": "called"})
        line = f"Counting: {self.run.num_calls} calls"
        return Section({"calls": self.run.num_calls}, (line,), (figure,))

    def close(self):
        pass


@pytest.fixture(scope="module")
def report(comfy, tmp_path_factory):
    """execute() of the node as ComfyUI calls it: hidden inputs set, temp folder of our own."""
    import folder_paths
    from slipstream.nodes.report import SlipstreamReport

    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
    prepared = SlipstreamReport.PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def execute(samples, model):
        latent = {"samples": samples}
        out = prepared.execute(latent=latent, model=model)
        assert out.result[0] is latent
        image, text, json_text = out.result[1:]
        assert image.shape[0] == 1
        assert image.shape[3] == 3
        shown = out.ui["images"][0]
        stored = Path(folder_paths.get_temp_directory()) / shown["filename"]
        assert stored.read_bytes()[:4] == b"\x89PNG"
        assert out.ui["text"] == (text,)
        return SimpleNamespace(image=image, text=text, json=json.loads(json_text))

    return execute


def counted(family: str):
    model = tiny.load(family).clone()
    attach(model, Counting())
    return model


def test_each_latent_shows_the_run_that_made_it(report):
    model = counted("flux")
    one = tiny.sample(model, "flux", seed=1)
    two = tiny.sample(model, "flux", seed=2, steps=3, cfg=1.0)
    first, second = report(one, model), report(two, model)
    assert first.json["run"]["id"] < second.json["run"]["id"]
    assert (first.json["run"]["steps"], second.json["run"]["steps"]) == (2, 3)
    assert second.json["counting"] == {"calls": 3}, "the second run's numbers, not the sum"
    assert second.text.splitlines()[1] == "Counting: 3 calls"
    assert first.json["run"]["model"] == "Flux"
    assert first.json["run"]["versions"]["comfyui"].startswith("0.")
    assert "remark" not in first.json
    again = report(one, model)
    assert again.json == first.json, "a cached latent keeps its run"


def test_downstream_clone_and_16_bit_latent_find_the_same_run(report):
    model = counted("flux")
    samples = tiny.sample(model, "flux", seed=3)
    expected = report(samples, model).json
    assert report(samples.to(torch.bfloat16), model.clone()).json == expected


def test_edited_latent_says_so_and_shows_the_latest_run(report):
    model = counted("flux")
    samples = tiny.sample(model, "flux", seed=4)
    found = report(samples * 1.5, model)
    assert found.json["remark"] == OTHER_LATENT
    assert found.text.startswith(OTHER_LATENT)
    assert found.json["run"]["id"] == report(samples, model).json["run"]["id"]


def test_sentence_without_a_technique_or_a_run(report):
    plain = tiny.load("flux")
    empty = tiny.latent("flux")
    assert report(empty, plain).text == NO_TECHNIQUE
    found = report(empty, counted("flux"))
    assert found.text == NO_RUN
    assert found.json["run"] is None
    assert found.image.shape[1] < 400


def test_interrupted_run_is_shown_as_unfinished(report):
    model = counted("flux")

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tiny.sample(model, "flux", seed=5, callback=stop)
    found = report(tiny.latent("flux"), model)
    assert found.json["run"]["completed"] is False
    assert "did not finish" in found.text


def test_nested_latent_of_video_and_audio(report):
    model = counted("ltxav")
    samples = tiny.sample(model, "ltxav", seed=6)
    assert samples.is_nested
    found = report(samples, model)
    assert "remark" not in found.json
    assert found.json["run"]["completed"] is True
