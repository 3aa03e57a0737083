"""Models whose own forward drives ComfyUI's block queue (LTX-2, MiniMax-H3) under a budget."""

import re
from pathlib import Path

import comfy.model_prefetch
import fake_vbar
import pytest
from fake_models import QUEUE_OWNERS, blocks, load, relative_error, sample, with_lora
from offload_probe import NOTHING, in_mode, leftovers, offloaded, report, resident_share
from slipstream.backends.architectures import find
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.offload.budget import buffer_bytes
from slipstream.backends.offload.config import OffloadConfig, OffloadError
from slipstream.backends.run import run_log

STEPS = 6  # enough to measure, plan and judge
SMALL = 1.02  # the queue aligns each weight

each_owner = pytest.mark.parametrize("family", QUEUE_OWNERS)


@pytest.fixture
def queues(monkeypatch):
    """The queues that the model itself has made."""
    made = []
    make = comfy.model_prefetch.make_prefetch_queue

    def recorded(*args):
        queue = make(*args)
        if queue is not None:
            made.append(queue)
        return queue

    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", recorded)
    return made


@each_owner
def test_bit_identical_at_every_budget(env, queues, family):
    model = load(family)
    full = sample(model, family)
    env.end_node()
    num_queues = len(queues)
    assert (num_queues > 0) == (env.manager == "dynamic")
    for share in (0.0, 0.25, 0.5, 1.0):
        queues.clear()
        budgeted = offloaded(model, share, -1)
        assert sample(budgeted, family).equal(full), share
        assert len(queues) == num_queues  # the model's own, and none of ours
        assert resident_share(budgeted) <= share + 0.03
        assert leftovers(model) == NOTHING
        env.end_node()
    assert sample(model, family).equal(full)


@each_owner
@pytest.mark.parametrize("mode", ["speed", "memory"])
def test_modes_leave_the_queue_alone(env, queues, family, mode):
    model = load(family)
    full = sample(model, family, steps=STEPS)
    num_queues = len(queues)
    env.end_node()
    patched = in_mode(model, mode, 0.6)
    assert sample(patched, family, steps=STEPS).equal(full)
    assert len(queues) == 2 * num_queues
    found = report(patched)["offload"]
    assert found["block_copies"] == 0
    assert found["no_prefetch"].endswith("streams its own blocks")
    assert resident_share(patched) <= 0.6
    text = run_log(patched).latest().to_text()
    assert re.search(r"blocks? ahead", text) is None


@each_owner
def test_manual_prefetch_is_refused(env, family):
    with pytest.raises(OffloadError, match="streams its own blocks: set prefetch to -1; the bud"):
        offloaded(load(family), 0.5)


@each_owner
def test_budget_counts_the_blocks_that_the_model_stages(env, family):
    model = load(family)
    sample(model, family)
    env.end_node()
    config = OffloadConfig(mode="manual", vram_budget_gb=1.0, prefetch=-1)
    counted = buffer_bytes(model, config)
    if env.manager == "classic":
        assert counted == 0  # ComfyUI's own reserve
        return
    fake_vbar.FakeCastBuffer.peak_bytes = 0
    sample(offloaded(model, 0.0, -1), family)
    assert counted / 2 < fake_vbar.FakeCastBuffer.peak_bytes <= counted * SMALL


@each_owner
def test_skipped_blocks_never_corrupt(env, family):
    model = load(family)
    plain, budgeted = model.clone(), offloaded(model, 0.0, -1)
    for patched in (plain, budgeted):
        for index in (0, 2):
            patched.set_model_patch_replace(
                lambda args, extra: {"img": args["img"]}, "dit", "double_block", index
            )
    wanted = sample(plain, family)
    env.end_node()
    assert sample(budgeted, family).equal(wanted)
    env.end_node()
    assert relative_error(sample(model, family), wanted) > 1e-3
    assert leftovers(model) == NOTHING


@each_owner
def test_with_the_cache(env, family):
    cache = CacheConfig(
        strategy="fbcache", engine="builtin", warmup=2, front_blocks=1,
        residual_diff_threshold=0.9, max_continuous_cached_steps=2,
    )  # fmt: skip
    model = load(family)
    wanted = sample(apply_cache(model, cache), family, steps=STEPS)
    plain = sample(model, family, steps=STEPS)
    env.end_node()
    both = apply_cache(offloaded(model, 0.25, -1), cache)
    assert sample(both, family, steps=STEPS).equal(wanted)
    assert not wanted.equal(plain)  # the cache did reuse
    assert leftovers(model) == NOTHING


@each_owner
def test_lora_and_exceptions(env, family):
    model = with_lora(load(family))
    full = sample(model, family)
    env.end_node()
    budgeted = offloaded(model, 0.0, -1)

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    blocks(model)[1].forward = fail
    with pytest.raises(RuntimeError, match="stop"):
        sample(budgeted, family)
    del blocks(model)[1].forward
    env.end_node()
    assert leftovers(model) == NOTHING
    assert relative_error(sample(budgeted, family), full) < 1e-5


def test_no_other_model_of_comfyui_drives_the_queue():
    """A family that begins to, in a newer ComfyUI, needs Notes.prefetches."""
    import comfy.ldm

    folder = Path(next(iter(comfy.ldm.__path__)))
    found = {
        path.parent.name
        for path in folder.rglob("*.py")
        if "make_prefetch_queue(" in path.read_text(encoding="utf-8")
    }
    assert found == {"lightricks", "minimax", "minimax_music"}  # the last is a text encoder's part
    model = load("wan")
    assert not find(model.model.diffusion_model).notes.prefetches
