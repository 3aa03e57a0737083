"""Checks that hold under classic and under dynamic memory management, on the fake accelerator."""

import comfy.model_management as management
import pytest
import torch
from fake_models import (
    FAMILIES,
    KINDS,
    blocks,
    load,
    relative_error,
    sample,
    state,
    with_lora,
)
from offload_probe import NOTHING, leftovers, offloaded, report, resident_share
from slipstream.backends.memory import host as memory
from slipstream.backends.offload import host, stream
from slipstream.backends.offload.state import LORA_ROUNDS
from slipstream.backends.run import run_log

DOUBLE = ("dit", "double_block")


def skip(args, extra):
    """A block replacement that leaves the block out, as skip-layer guidance does."""
    return {"img": args["img"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_at_every_budget(env, family, kind):
    model = load(family, kind)
    full = sample(model, family)
    env.end_node()
    for share in (0.0, 0.25, 0.5, 1.0):
        for prefetch in (-1, 0):
            budgeted = offloaded(model, share, prefetch)
            found = sample(budgeted, family)
            run = report(budgeted)["offload"]
            assert found.equal(full), (share, prefetch, relative_error(found, full))
            if run["budget_bytes"] < memory.placed_bytes(model):
                assert resident_share(budgeted) <= share + 0.03, (share, prefetch)
                assert (run["block_copies"] > 0) == (prefetch == 0)
            else:
                assert resident_share(budgeted) > 0.95
            env.end_node()
    assert sample(model, family).equal(full)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_streamed_as_at_the_same_residency(env, kind):
    if env.manager == "dynamic" and kind != "fp32":
        pytest.skip("ComfyUI requantizes resident fp8 weights with LoRA: its own runs differ")
    model = with_lora(load("wan", kind))
    for share in (0.0, 0.5):
        staged, cast = (sample(offloaded(model, share, prefetch), "wan") for prefetch in (0, -1))
        assert staged.equal(cast), share


@pytest.mark.parametrize("kind", KINDS)
def test_report_says_where_residency_changes_the_rounding(env, kind):
    """A LoRA is merged into resident weights alone; in fp32 that rounds nothing away."""
    for patcher, is_patched in ((load("wan", kind), False), (with_lora(load("wan", kind)), True)):
        budgeted = offloaded(patcher, 0.0, -1)
        sample(budgeted, "wan", steps=1)
        text = run_log(budgeted).latest().to_text()
        assert (LORA_ROUNDS in text) == (is_patched and kind != "fp32")
        env.end_node()


def test_lora_before_and_after_the_node(env):
    model = load("wan")
    full = sample(with_lora(model), "wan")
    env.end_node()
    for budgeted in (offloaded(with_lora(model), 0.3), with_lora(offloaded(model, 0.3))):
        found = sample(budgeted, "wan")
        assert relative_error(found, full) < 1e-5
        assert resident_share(budgeted) < 0.35
        env.end_node()
    assert relative_error(sample(model, "wan"), full) > 1e-2  # the LoRA is felt


def test_model_without_the_node_refills(env):
    model = load("wan")
    full = sample(model, "wan")
    env.end_node()
    sample(offloaded(model, 0.25), "wan")
    assert resident_share(model) < 0.3
    env.end_node()
    assert sample(model, "wan").equal(full)
    assert resident_share(model) > 0.95


@pytest.mark.parametrize("lora", [False, True])
def test_unload_restores_every_weight(env, lora):
    model = load("wan")
    before, untouched = state(model), None
    for patcher in (model, offloaded(with_lora(model) if lora else model, 0.4)):
        sample(patcher, "wan")
        env.end_node()
        management.unload_all_models()
        after = state(model)
        assert all(torch.equal(after[key], before[key]) for key in before)
        away = {n for n, p in model.model.named_parameters() if p.device.type != "cpu"}
        assert untouched in (None, away)  # ComfyUI leaves a few small ones itself when dynamic
        untouched = away
    assert leftovers(model) == NOTHING


@pytest.mark.parametrize("error", [RuntimeError, management.InterruptProcessingException])
def test_nothing_stays_after_an_exception(env, error):
    model = with_lora(load("wan"))
    full = sample(model, "wan")
    env.end_node()

    def fail(*args, **kwargs):
        raise error("stop")

    budgeted = offloaded(model, 0.0)
    held = None
    for _ in range(2):
        blocks(model)[2].forward = fail
        with pytest.raises(error):
            sample(budgeted, "wan")
        del blocks(model)[2].forward
        env.end_node()
        assert leftovers(model) == NOTHING
        assert held in (None, env.device.held())  # what staging held is gone: nothing piles up
        held = env.device.held()
    assert report(budgeted)["run"]["completed"] is False
    assert relative_error(sample(budgeted, "wan"), full) < 1e-5


@pytest.mark.parametrize("skipped", [(1, 2), (0, 3), (0, 1, 2)])
def test_replaced_blocks_never_corrupt(env, skipped):
    model = load("wan")
    plain, budgeted = model.clone(), offloaded(model, 0.0)
    for patched in (plain, budgeted):
        for index in skipped:
            patched.set_model_patch_replace(
                lambda args, extra: {"img": args["img"]}, *DOUBLE, index
            )
    wanted = sample(plain, "wan")
    env.end_node()
    assert sample(budgeted, "wan").equal(wanted)
    assert leftovers(model) == NOTHING


def test_blocks_that_run_twice_never_corrupt(env):
    model = load("wan")
    plain, budgeted = model.clone(), offloaded(model, 0.0)

    def again(args, extra):
        return extra["original_block"]({**args, **extra["original_block"](args)})

    for patched in (plain, budgeted):
        patched.set_model_patch_replace(again, *DOUBLE, 1)
    wanted = sample(plain, "wan")
    env.end_node()
    assert sample(budgeted, "wan").equal(wanted)


def test_skip_layer_guidance(env):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    model = load("flux")

    def guided(patcher):
        layers = {"double_layers": "1", "single_layers": "0, 2"}
        return SkipLayerGuidanceDiT.execute(patcher, 3.0, 0.0, 1.0, **layers).result[0]

    unguided = sample(model, "flux")
    wanted = sample(guided(model), "flux")
    env.end_node()
    assert sample(guided(offloaded(model, 0.0)), "flux").equal(wanted)
    assert relative_error(unguided, wanted) > 1e-3


def test_wrong_staging_is_seen(env, monkeypatch):
    """Negative control of the checks above: what they guard against does corrupt."""
    model = load("wan")
    plain, budgeted = model.clone(), offloaded(model, 0.0)
    for patched in (plain, budgeted):
        patched.set_model_patch_replace(skip, *DOUBLE, 1)
    wanted = sample(plain, "wan")
    env.end_node()
    if env.manager == "dynamic":  # ComfyUI's queue, not told about the block that is skipped
        monkeypatch.setattr(host.PrefetchQueue, "advance", host.PrefetchQueue._pop)
        monkeypatch.setattr(host.PrefetchQueue, "finish", lambda self: self._pop(None))
    else:  # the buffer of another block
        copy = stream._copy
        monkeypatch.setattr(stream, "_copy", lambda one, buffer: copy(one, buffer).mul_(1.1))
    assert relative_error(sample(budgeted, "wan"), wanted) > 0.01
