"""SlipstreamCache and SlipstreamCacheDiT through a real server's queue."""

import json

import pytest
import queue_client
from smoke_prompt import digest, flux_prompt

STEPS = 10
# Random weights change a lot from step to step: a threshold that still reuses.
EAGER = {"preset": "custom", "front_blocks": 1, "residual_diff_threshold": 0.95,
         "max_warmup_steps": 3, "max_continuous_cached_steps": 3}  # fmt: skip


def with_cache(prompt, node="SlipstreamCache", **widgets):
    """The smoke prompt with our node before the sampler and the report behind it."""
    if node == "SlipstreamCache":
        widgets = {"strategy": "scm", "cache_ratio": 0.5, "warmup": 4, **widgets}
    prompt["cache"] = {"class_type": node, "inputs": {"model": ["model", 0], **widgets}}
    prompt["sampler"]["inputs"]["model"] = ["cache", 0]
    prompt["report"] = {
        "class_type": "SlipstreamReport",
        "inputs": {"latent": ["sampler", 0], "model": ["cache", 0]},
    }
    prompt["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 3]}}
    prompt["digest"]["inputs"]["samples"] = ["report", 0]
    return prompt


def cache(result):
    return json.loads(result.outputs["json"]["text"][0])["cache"]


def test_plain_cached_plain_again(server):
    plain = digest(queue_client.run(server, flux_prompt(seed=301, steps=STEPS)))
    noded = queue_client.run(server, with_cache(flux_prompt(seed=301, steps=STEPS)))
    assert digest(noded) != plain
    found = cache(noded)
    assert found["strategy"] == "scm"
    assert found["hits"] > 0
    assert found["blocks_skipped"] == 5 * found["hits"]
    assert "scm with taylorseer: " in noded.outputs["report"]["text"][0]
    assert noded.outputs["report"]["images"]
    queue_client.run(server, flux_prompt(seed=302, steps=2))
    again = queue_client.run(server, flux_prompt(seed=301, steps=STEPS))
    assert digest(again) == plain


def test_engines_make_the_same_picture(server):
    pytest.importorskip("cache_dit")
    results = {}
    for engine in ("builtin", "cache-dit"):
        prompt = with_cache(flux_prompt(seed=311, steps=STEPS), engine=engine, strategy="scm")
        results[engine] = queue_client.run(server, prompt)
    assert cache(results["builtin"])["engine"] == "builtin"
    assert cache(results["cache-dit"])["engine"].startswith("cache-dit ")
    assert digest(results["builtin"]) == digest(results["cache-dit"])


def test_the_patched_model_is_sampled_again_and_counts_anew(server):
    for seed in (321, 322):
        prompt = with_cache(flux_prompt(seed=seed, steps=STEPS), "SlipstreamCacheDiT", **EAGER)
        result = queue_client.run(server, prompt)
        found = cache(result)
        assert found["evaluations"] == STEPS
        assert found["hits"] == 5
        assert [d["reused"] for d in found["decisions"][:3]] == [False] * 3
    assert "cache" in result.cached


def test_auto_says_what_it_did(server):
    prompt = with_cache(flux_prompt(seed=331, steps=4), strategy="auto")
    result = queue_client.run(server, prompt)
    assert cache(result)["strategy"] == "scm"
    assert "warmup is 1 instead of 4: the run has 4 steps" in result.outputs["report"]["text"][0]


def test_a_preset_that_wins_says_so(server):
    settings = {"preset": "balanced", "front_blocks": 3}
    prompt = with_cache(flux_prompt(seed=341, steps=STEPS), "SlipstreamCacheDiT", **settings)
    text = queue_client.run(server, prompt).outputs["report"]["text"][0]
    assert "Preset balanced wins over front_blocks 3: set preset to custom" in text


@pytest.mark.parametrize(
    ("node", "widgets", "steps", "where", "sentence"),
    [
        ("SlipstreamCache", {"strategy": "deepcache"}, 8, "KSampler",
         "deepcache needs a UNet (SD1.5, SDXL); this is Flux: use cache-dit."),
        ("SlipstreamCache", {"strategy": "cache-dit"}, 4, "KSampler",
         "cache-dit needs 6 steps or more, this run has 4: use scm."),
        ("SlipstreamCacheDiT", {"preset": "quality"}, 8, "KSampler",
         "front_blocks 8 + back_blocks 0 leave nothing to skip in 5 blocks."),
        ("SlipstreamCacheDiT", {"preset": "custom", "scm": "warp"}, 8, "SlipstreamCacheDiT",
         "scm is 'warp': choose off, slow, medium, fast or ultra"),
        ("SlipstreamCacheDiT", {**EAGER, "scm": "6,1,3"}, 8, "KSampler",
         "scm counts add up to 10, the run has 8 steps."),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(server, node, widgets, steps, where, sentence):
    prompt = with_cache(flux_prompt(seed=351, steps=steps), node, **widgets)
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert caught.value.node_type == where
    assert sentence in caught.value.message


def test_another_cache_on_the_model_is_refused(server):
    prompt = with_cache(flux_prompt(seed=361, steps=8))
    prompt["easy"] = {
        "class_type": "EasyCache",
        "inputs": {"model": ["model", 0], "reuse_threshold": 0.2, "start_percent": 0.15,
                   "end_percent": 0.95, "verbose": False},
    }  # fmt: skip
    prompt["cache"]["inputs"]["model"] = ["easy", 0]
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert "EasyCache both skip steps: remove one of them." in caught.value.message


@pytest.mark.parametrize(
    ("widgets", "kind"),
    [
        ({"strategy": "magic"}, "value_not_in_list"),
        ({"cache_ratio": 1.5}, "value_bigger_than_max"),
        ({"warmup": -1}, "value_smaller_than_min"),
        ({"cooldown": 0}, "value_smaller_than_min"),
    ],
)
def test_unknown_options_are_rejected_before_anything_runs(server, widgets, kind):
    prompt = with_cache(flux_prompt(seed=371), **widgets)
    with pytest.raises(queue_client.PromptRejected) as caught:
        queue_client.run(server, prompt)
    (error,) = caught.value.node_errors["cache"]["errors"]
    assert error["type"] == kind
