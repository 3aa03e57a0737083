"""SlipstreamLayerOffload through a real server's queue: on a CPU it changes nothing and says so."""

import json

import pytest
import queue_client
from smoke_prompt import digest, flux_prompt

CPU_REASON = "the model runs on the CPU: there is no VRAM to budget"


def with_offload(prompt, **widgets):
    """The smoke prompt with our node before the sampler and the report behind it."""
    settings = {"mode": "auto", "vram_budget_gb": 0.0, **widgets}
    prompt["offload"] = {
        "class_type": "SlipstreamLayerOffload",
        "inputs": {"model": ["model", 0], **settings},
    }
    prompt["sampler"]["inputs"]["model"] = ["offload", 0]
    prompt["report"] = {
        "class_type": "SlipstreamReport",
        "inputs": {"latent": ["sampler", 0], "model": ["offload", 0]},
    }
    prompt["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 3]}}
    prompt["digest"]["inputs"]["samples"] = ["report", 0]
    return prompt


def report(result):
    return json.loads(result.outputs["json"]["text"][0])


def test_plain_then_with_the_node_then_plain_again(server):
    plain = digest(queue_client.run(server, flux_prompt(seed=601)))
    noded = queue_client.run(server, with_offload(flux_prompt(seed=601), mode="memory"))
    assert digest(noded) == plain
    assert report(noded)["offload"]["mode"] == "memory"
    assert report(noded)["offload"]["reason"] == CPU_REASON
    assert f"offload: nothing done, {CPU_REASON}" in noded.outputs["report"]["text"][0]
    again = queue_client.run(server, flux_prompt(seed=601, steps=2))
    assert digest(again) == plain


def test_memory_of_every_model_with_two_seeds(server):
    for seed in (611, 612):
        result = queue_client.run(server, with_offload(flux_prompt(seed=seed)))
        memory = report(result)["memory"]
        assert memory["device"] == "cpu"
        assert memory["peak_bytes"] is None
        assert "Flux" in {model["name"] for model in memory["models"]}
        assert all(model["total_bytes"] > 0 for model in memory["models"])
    assert "offload" in result.cached


def test_prefetch_may_be_left_out_or_given(server):
    for seed, widgets in ((621, {}), (622, {"prefetch": 0.25}), (623, {"prefetch": -1.0})):
        result = queue_client.run(server, with_offload(flux_prompt(seed=seed), **widgets))
        assert report(result)["offload"]["mode"] == "auto"


@pytest.mark.parametrize("widgets", [{}, {"vram_budget_gb": 4.0}, {"prefetch": 4.0}])
def test_manual_without_vram_runs_and_says_so(server, widgets):
    """A workflow made for a GPU, on a machine that has none."""
    prompt = with_offload(flux_prompt(seed=625), mode="manual", **widgets)
    found = report(queue_client.run(server, prompt))["offload"]
    assert found["mode"] == "manual"
    assert found["reason"] == CPU_REASON


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"prefetch": 1.5}, "it must be -1, a fraction below 1, or a whole number"),
        ({"prefetch": -0.5}, "prefetch is -0.5"),
    ],
)
def test_mistakes_are_one_sentence(server, widgets, sentence):
    prompt = with_offload(flux_prompt(seed=631), **widgets)
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"mode": "fast"}, "'fast' not in ['auto', 'speed', 'memory', 'manual', 'off']"),
        ({"vram_budget_gb": -1.0}, "Value -1.0 smaller than min of 0.0"),
        ({"vram_budget_gb": 1000.0}, "Value 1000.0 bigger than max of 512.0"),
        ({"prefetch": "nonsense"}, "prefetch, nonsense, could not convert string to float"),
    ],
)
def test_values_out_of_range_are_rejected(server, widgets, sentence):
    with pytest.raises(queue_client.PromptRejected) as caught:
        queue_client.run(server, with_offload(flux_prompt(seed=641), **widgets))
    assert sentence in str(caught.value)


def test_mode_off_is_bit_identical(server):
    plain = digest(queue_client.run(server, flux_prompt(seed=651)))
    for widgets in ({"mode": "off"}, {"mode": "off", "vram_budget_gb": 1.0}):
        off = queue_client.run(server, with_offload(flux_prompt(seed=651), **widgets))
        assert digest(off) == plain
        assert "offload: nothing done, mode is off" in off.outputs["report"]["text"][0]
        assert "on the CPU, so there is no VRAM to count" in off.outputs["report"]["text"][0]
