"""SlipstreamAttention through a real server's queue: runs, repeats, and every bad value."""

import json

import pytest
import queue_client
from smoke_prompt import digest, flux_prompt


def with_attention(prompt, **widgets):
    """The smoke prompt with our node before the sampler and the report behind it."""
    settings = {"policy": "balanced", "backend": "auto", "strict": False, **widgets}
    prompt["attention"] = {
        "class_type": "SlipstreamAttention",
        "inputs": {"model": ["model", 0], **settings},
    }
    prompt["sampler"]["inputs"]["model"] = ["attention", 0]
    prompt["report"] = {
        "class_type": "SlipstreamReport",
        "inputs": {"latent": ["sampler", 0], "model": ["attention", 0]},
    }
    prompt["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 3]}}
    prompt["digest"]["inputs"]["samples"] = ["report", 0]
    return prompt


def attention(result):
    return json.loads(result.outputs["json"]["text"][0])["attention"]


def test_plain_then_with_the_node_then_plain_again(server):
    plain = digest(queue_client.run(server, flux_prompt(seed=201)))
    noded = queue_client.run(server, with_attention(flux_prompt(seed=201)))
    assert digest(noded) == plain
    assert attention(noded)["calls"] == {"comfyui:pytorch": 10}
    assert any("need a CUDA or ROCm GPU" in reason for reason in attention(noded)["reasons"])
    assert "Attention (balanced): 10 calls" in noded.outputs["report"]["text"][0]
    assert "Attention (balanced): 10 calls" in noded.progress_text["report"]
    assert noded.outputs["report"]["images"]
    again = queue_client.run(server, flux_prompt(seed=201, steps=2))
    assert digest(again) == plain


def test_cached_model_reports_each_run_by_itself(server):
    for seed in (211, 212):
        result = queue_client.run(server, with_attention(flux_prompt(seed=seed)))
        assert sum(attention(result)["calls"].values()) == 10
    assert "attention" in result.cached


def test_manual_kernel_samples_the_same_picture(server):
    prompt = with_attention(flux_prompt(seed=221), policy="manual", backend="math")
    assert attention(queue_client.run(server, prompt))["calls"] == {"math": 10}


@pytest.mark.parametrize(
    ("widgets", "node", "sentence"),
    [
        ({"policy": "manual"}, "SlipstreamAttention", "Policy 'manual' needs a kernel"),
        (
            {"policy": "manual", "backend": "sage1"},
            "SlipstreamAttention",
            "Backend 'sage1' is not available",
        ),
        (
            {"dense_blocks": "3-"},
            "SlipstreamAttention",
            "dense_blocks takes numbers and ranges such as '0, 1, 47-49'; got '3-'.",
        ),
        (
            {"policy": "exact", "strict": True},
            "KSampler",
            "Strict is on and block double/0 cannot use 'policy exact'",
        ),
    ],
)
def test_mistakes_are_one_sentence(server, widgets, node, sentence):
    prompt = with_attention(flux_prompt(seed=231), **widgets)
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert caught.value.node_type == node
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("widgets", "kind"),
    [
        ({"backend": "sage9"}, "value_not_in_list"),
        ({"policy": "turbo"}, "value_not_in_list"),
        ({"min_cos": 2.0}, "value_bigger_than_max"),
        ({"min_tokens": -1}, "value_smaller_than_min"),
    ],
)
def test_unknown_options_are_rejected_before_anything_runs(server, widgets, kind):
    prompt = with_attention(flux_prompt(seed=241), **widgets)
    with pytest.raises(queue_client.PromptRejected) as caught:
        queue_client.run(server, prompt)
    (error,) = caught.value.node_errors["attention"]["errors"]
    assert error["type"] == kind
    assert error["extra_info"]["input_name"] == next(iter(widgets))


def test_advanced_inputs_may_be_missing(server):
    prompt = with_attention(flux_prompt(seed=251))
    assert set(prompt["attention"]["inputs"]) == {"model", "policy", "backend", "strict"}
    assert attention(queue_client.run(server, prompt))["config"]["min_tokens"] == 1024
