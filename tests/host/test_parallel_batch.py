"""Rows of a batch over worker processes, in ComfyUI's own samplers; every tiny family in parts.

Parts of any lengths, cut as `parallel/batch.py` cuts, give what the whole call gives; and runs of
KSampler agree with one device to 1e-6 relative, at the same number of rows.
"""

import functools
import os
import time
from contextlib import contextmanager

import pytest
import shared_calls
import tiny
import torch
from slipstream.backends.architectures import find, whole_sequence
from slipstream.backends.architectures.rows import why_whole
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.run import run_log
from slipstream.parallel import batch
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig
from slipstream.parallel.distribute import Distributor
from slipstream.parallel.workers import WorkerError

pytestmark = [
    pytest.mark.usefixtures("comfy", "workers"),
    pytest.mark.skipif(os.name == "nt", reason="/proc"),
]
TWO = "cpu,cpu"
LIMIT = 1e-6


@pytest.fixture(scope="module")
def workers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    pool().close()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uneven(monkeypatch):
    """Rows are dealt 2 + 1 of 3, 3 + 1 of 4 and so on, whatever this machine is busy with."""

    def deal(self, layout, num_rows, branch=0):
        return batch.deal(num_rows, [1.9, *[1.0] * (layout.batch - 1)])

    monkeypatch.setattr(Distributor, "deal", deal)


def of_batch(shape, images):
    if isinstance(shape[0], int):
        return (images, *shape[1:])
    return tuple(of_batch(one, images) for one in shape)


def shape_of(family, images):
    is_audio = family in tiny.tiny_audio.FAMILIES  # with sizes of their own
    shape = tiny.latent_shape(family) if is_audio else shared_calls.odd_shape(family)
    return of_batch(shape, images)


def patched(model, devices=TWO, **fields):
    return apply_parallel(model, SequenceParallelConfig(devices=devices, timeout_s=60, **fields))


def report(model):
    return run_log(model).latest().to_json()["parallel"]


def notes(model):
    return run_log(model).latest().notes


def parts_of(latent):
    return list(latent.unbind()) if latent.is_nested else [latent]


def difference(a, b):
    pairs = zip(parts_of(a), parts_of(b), strict=True)
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def assert_rows_shared(model, family, *, lanes=2, local=0, devices=TWO, images=2, **sampling):
    """A run agrees with one device, over so many lanes; the report of it.

    Guidance multiplies the rounding of both prompts: 1e-6 of a call is more in a run at cfg 7.
    """
    sampling = {"steps": 3, "shape": shape_of(family, images), **sampling}
    expected = tiny.sample(model, family, **sampling)
    shared = patched(model, devices)
    out = tiny.sample(shared, family, **sampling)
    found = report(shared)
    assert difference(out, expected) <= LIMIT * max(1.0, sampling.get("cfg", 2.0) / 2)
    assert found["calls_local"] == local, found["reasons"]
    assert found["batch"] == lanes, found["layout"]
    assert found["calls_distributed"] > 0
    return found


# --- every family: the network's own calls in parts

# Families whose network takes no batch of more than one conditioned image, on one device either.
ONE_AT_A_TIME = ("minimax_h3", "pixart", "wan_dancer", "wan_humo")
NOT_ALONE = ("wan_causal", "wan_animate2", "ace_step15")
FAMILIES = tuple(name for name in tiny.ALL if name not in (*ONE_AT_A_TIME, *NOT_ALONE))
SLICE = ("sd15", "sdxl", "flux", "qwen_image", "wan", "ltxav", "hunyuan_video", "sd3", "z_image")


@functools.lru_cache(maxsize=2)
def recorded(family, images):
    heads = max(1, tiny.ALL[family].min_heads)
    return shared_calls.record(family, heads=heads, shape=shape_of(family, images))


def differences(call, counts, *, reverse=False):
    """Of the call in parts of so many rows to the whole call, relative."""
    rows = batch.rows(call.arguments)
    assert sum(counts) == rows
    architecture = find(call.network)
    unbatched = architecture.notes.unbatched if architecture else ()
    options = whole_sequence(architecture, {})
    whole = call.run(options)
    spans = list(batch.spans(counts))
    parts = [
        call.with_(**batch.cut(call.arguments, rows, start, length, unbatched)).run(options)
        for _, start, length in (reversed(spans) if reverse else spans)
    ]
    joined = [torch.cat(tensors, 0) for tensors in zip(*parts, strict=True)]
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(joined, whole, strict=True)
    )


def check_family(family, images):
    call = recorded(family, images)
    rows = batch.rows(call.arguments)
    assert rows % images == 0
    for world in range(2, 5):
        for speeds in ([1.0] * world, [3.3, *[1.0] * (world - 1)], [1.0, 2.5, 1.0, 1.0][:world]):
            counts = batch.deal(rows, speeds)
            if len([n for n in counts if n]) > 1:
                assert differences(call, counts) <= LIMIT, (rows, counts)


@pytest.mark.parametrize("family", SLICE)
def test_parts_of_a_call_give_the_whole(family):
    call = recorded(family, 2)
    rows = batch.rows(call.arguments)
    assert differences(call, [rows - 1, 1]) <= LIMIT


@pytest.mark.full
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_call_give_the_whole_in_every_family(family, images):
    check_family(family, images)


@pytest.mark.full
@pytest.mark.parametrize("rows", range(2, 10))
@pytest.mark.parametrize("family", ["sd15", "flux", "wan", "qwen_image", "ltxav"])
def test_any_number_of_rows(family, rows):
    call = recorded(family, 5)
    whole = batch.rows(call.arguments)
    cut = call.with_(**batch.cut(call.arguments, whole, 0, rows))
    for world in range(2, 5):
        counts = batch.deal(rows, [1.0, 2.2, 1.0, 0.7][:world])
        if len([n for n in counts if n]) > 1:
            assert differences(cut, counts) <= LIMIT


def test_rows_that_are_swapped_are_noticed():
    call = recorded("sd15", 2)
    rows = batch.rows(call.arguments)
    assert differences(call, [rows - 1, 1], reverse=True) > 1e-3


def first_dimensions(value, path=""):
    if torch.is_tensor(value):
        return {path: value.shape[0]} if value.ndim else {}
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, (list, tuple)) else ()  # fmt: skip
    return {k: v for name, one in named for k, v in first_dimensions(one, f"{path}.{name}").items()}


def check_dimensions(family):
    """Whatever does not grow with the batch is one row for all, or named in `unbatched`."""
    few, many = (recorded(family, images) for images in (1, 3))
    rows = [batch.rows(call.arguments) for call in (few, many)]
    architecture = find(few.network)
    unbatched = architecture.notes.unbatched if architecture else ()
    before = first_dimensions(few.arguments)
    for path, length in first_dimensions(many.arguments).items():
        is_batch = before[path] == rows[0] and length == rows[1]
        named = set(path.split(".")) & set(unbatched)
        assert is_batch or length == 1 or named, f"{path} has {length} of {rows[1]} rows"


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_every_first_dimension_is_the_batch(family):
    check_dimensions(family)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_first_dimension_is_the_batch_in_every_family(family):
    check_dimensions(family)


@pytest.mark.parametrize("family", NOT_ALONE)
def test_networks_whose_rows_depend_on_others_are_refused(family):
    assert "cannot be shared" in why_whole(tiny.load(family).model.diffusion_model)


def test_refused_names_are_comfyuis():
    import comfy.ldm.ace.ace_step15 as ace
    import comfy.ldm.hunyuan3dv2_1.hunyuandit as hunyuan3d
    import comfy.ldm.minimax.model as minimax
    import comfy.ldm.seedvr.model as seedvr
    import comfy.ldm.trellis2.model as trellis
    import comfy.ldm.triposplat.model as triposplat
    import comfy.ldm.wan.ar_model as ar
    import comfy.ldm.wan.model_animate2 as animate
    from slipstream.backends.architectures import rows

    modules = (ace, hunyuan3d, minimax, seedvr, trellis, triposplat, ar, animate)
    for name in {**rows.REFUSED, **rows._ONE_ROW}:
        assert any(hasattr(module, name) for module in modules), name


def test_frames_of_stable_video_diffusion_are_no_rows():
    import comfy.supported_models

    unet = dict(comfy.supported_models.SVD_img2vid.unet_config)
    sizes = {**tiny.ALL["sd15"].unet(1), **unet, "model_channels": 64, "channel_mult": (1, 1)}
    sizes |= {"use_temporal_resblock": True, "extra_ff_mix_layer": True, "merge_factor": 0.5}
    sizes |= {"num_classes": "sequential", "context_dim": 64, "merge_strategy": "learned"}
    sizes |= {"transformer_depth": [1, 1], "video_kernel_size": [3, 1, 1]}
    network = tiny.in_memory(comfy.supported_models.SVD_img2vid, sizes).model.diffusion_model
    assert "its rows are the frames of one video" in why_whole(network)


# --- runs of KSampler


@pytest.mark.parametrize(
    ("family", "images", "sampling"),
    [
        ("sd15", 3, {"sampler": "euler_ancestral", "cfg": 7.0}),
        ("sd15", 3, {"sampler": "dpmpp_2m_sde", "cfg": 1.0}),
        ("sd15", 2, {"sampler": "uni_pc", "cfg": 7.0, "split": True}),
        ("flux", 3, {"sampler": "dpmpp_sde", "cfg": 1.0}),
        ("sd3", 2, {"sampler": "heun", "cfg": 4.0}),
        ("ltxav", 2, {"sampler": "euler"}),
        ("wan", 2, {"sampler": "uni_pc", "split": True}),
    ],
)
def test_samplers(family, images, sampling):
    model = tiny.load(family, heads=3)
    found = assert_rows_shared(model, family, images=images, **sampling)
    assert sum(one["rows"] for one in found["rows"]) in (images, 2 * images)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "uni_pc"])
@pytest.mark.parametrize("family", ["sd15", "flux", "wan", "hunyuan_video"])
def test_samplers_over_more_processes(family, sampler, cfg, world):
    model = tiny.load(family, heads=3)
    devices = ",".join(["cpu"] * world)
    lanes = 3 if world == 3 else world
    assert_rows_shared(
        model, family, images=4, sampler=sampler, cfg=cfg, devices=devices, lanes=lanes
    )


def test_one_picture_with_two_prompts_is_a_batch_of_two():
    """ComfyUI puts prompts of one length into one call: no thread, no second branch."""
    model = tiny.load("sd15")
    found = assert_rows_shared(model, "sd15", images=1, cfg=7.0)
    assert found["layout"] == "batch 2 x cfg 1 x ulysses 1 x ring 1"
    assert [one["rows"] for one in found["rows"]] == [1, 1]


def test_prompts_of_unlike_lengths_take_two_branches():
    model = tiny.load("sd15")
    expected = tiny.sample(model, "sd15", split=True)
    shared = patched(model)
    assert difference(tiny.sample(shared, "sd15", split=True), expected) <= LIMIT
    found = report(shared)
    assert found["layout"] == "batch 1 x cfg 2 x ulysses 1 x ring 1"
    assert found["calls_local"] == 0


def test_one_picture_and_one_prompt_shares_tokens_where_it_can():
    model = tiny.load("flux", heads=3)
    expected = tiny.sample(model, "flux", cfg=1.0)
    shared = patched(model, batch=2)
    assert difference(tiny.sample(shared, "flux", cfg=1.0), expected) <= LIMIT
    assert report(shared)["layout"] == "batch 1 x cfg 1 x ulysses 2 x ring 1"
    assert "Batch of 1 and one prompt: tokens are shared instead." in notes(shared)
    unet = patched(tiny.load("sd15"))
    tiny.sample(unet, "sd15", cfg=1.0)
    assert "No token plan for class UNetModel" in str(report(unet)["reasons"])


def test_images_over_halves_of_four_processes():
    model = tiny.load("wan", heads=3)
    four = "cpu,cpu,cpu,cpu"
    found = assert_rows_shared(model, "wan", devices=four, lanes=2, split=True)
    assert found["layout"] == "batch 2 x cfg 2 x ulysses 1 x ring 1"
    found = assert_rows_shared(model, "wan", devices=four, lanes=2, cfg=1.0)
    assert found["layout"] == "batch 2 x cfg 1 x ulysses 2 x ring 1"


def test_a_model_that_takes_one_at_a_time_says_so():
    model = tiny.load("minimax_h3", heads=3)
    expected = tiny.sample(model, "minimax_h3", cfg=1.0)
    shared = patched(model, batch=2)
    assert difference(tiny.sample(shared, "minimax_h3", cfg=1.0), expected) <= LIMIT
    assert any("one image at a time (MiniMax-H3)" in note for note in notes(shared))


def test_the_graph_again_and_without_the_node():
    model = tiny.load("sd15")
    sampling = {"shape": shape_of("sd15", 3), "steps": 2}
    expected = tiny.sample(model, "sd15", **sampling)
    shared = patched(model)
    first = tiny.sample(shared, "sd15", **sampling)
    assert torch.equal(tiny.sample(shared, "sd15", **sampling), first)
    assert torch.equal(tiny.sample(model, "sd15", **sampling), expected)
    assert "forward" not in model.model.diffusion_model.__dict__
    assert "memory_required" not in model.model.__dict__


def test_a_batch_stays_one_call_where_one_devices_memory_would_split_it(monkeypatch):
    """ComfyUI puts prompts into one call if 1.5 times its memory is free: each lane needs half."""
    model = tiny.load("sd15")
    shape = shape_of("sd15", 2)
    needed = model.model.memory_required([4, *shape[1:]])
    seen = []
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: needed * 1.2)
    tiny.sample(model, "sd15", shape=shape, steps=1)
    assert seen == [2, 2]
    seen.clear()
    shared = patched(model)
    monkeypatch.setattr(
        Distributor, "deal", lambda self, layout, rows, branch=0: batch.deal(rows, [1] * 2)
    )
    tiny.sample(shared, "sd15", shape=shape, steps=2)
    handle.remove()
    assert seen == [4, 4], "one call in each step"
    assert report(shared)["calls_distributed"] == 2


# --- what hangs on conditionings and on the model


def regional(model, family, **fields):
    """Two prompts on halves of the picture, and one under a mask."""
    (one,), (two,), (three,) = (tiny.text(family, seed=seed) for seed in (1, 2, 3))
    mask = torch.zeros(1, 14, 10)
    mask[:, 4:, :6] = 1
    return [
        [one[0], {**one[1], "area": (8, 10, 0, 0), "strength": 1.0}],
        [two[0], {**two[1], "area": (6, 10, 8, 0), "strength": 0.8}],
        [three[0], {**three[1], "mask": mask, "mask_strength": 0.7}],
    ]


def test_regional_prompts():
    model = tiny.load("sd15")
    positive = regional(model, "sd15")
    found = assert_rows_shared(model, "sd15", images=2, positive=positive, cfg=5.0)
    assert found["calls_distributed"] > 3, "several calls in each step"


def test_inpainting():
    model = tiny.load("flux", heads=3)
    mask = torch.zeros(2, 1, 14, 10)
    mask[0, :, :6], mask[1, :, 6:] = 1, 1
    assert_rows_shared(model, "flux", mask=mask, sampler="euler_ancestral")


def test_lora_on_a_unet():
    import comfy.sd

    model = tiny.load("sd15")
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for key, value in model.model.state_dict().items():
        if key.endswith("attn1.to_q.weight"):
            name = key.removesuffix(".weight")
            weights[f"{name}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=generator)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)
    assert with_lora.patches
    sampling = {"shape": shape_of("sd15", 2), "steps": 1}
    plain, other = (tiny.sample(m, "sd15", **sampling) for m in (model, with_lora))
    assert difference(plain, other) > 1e-4
    assert_rows_shared(with_lora, "sd15")


def test_controlnet_residuals_are_cut_by_rows():
    """Each row has residuals of its own; a real ControlNet is in tests/server."""
    from comfy.controlnet import ControlBase

    model = tiny.load("flux", heads=3)
    width = model.model.diffusion_model.hidden_size
    rows = []

    class Residuals(ControlBase):
        def get_control(self, x, timestep, cond, number, options):
            rows.append(x.shape[0])
            generator = torch.Generator().manual_seed(9)
            tokens = (x.shape[2] // 2) * (x.shape[3] // 2)
            residual = torch.randn(x.shape[0], tokens, width, generator=generator)
            return {"input": [residual], "output": []}

        def get_models(self):
            return []

    ((text, fields),) = tiny.text("flux")
    with_control = [[text, {**fields, "control": Residuals(), "control_apply_to_uncond": True}]]
    sampling = {"shape": shape_of("flux", 3), "steps": 3, "cfg": 1.0}
    plain, other = (
        tiny.sample(model, "flux", positive=p, **sampling)
        for p in (tiny.text("flux"), with_control)
    )
    assert difference(plain, other) > 1e-3, "the control changes nothing"
    assert_rows_shared(model, "flux", images=3, positive=with_control, cfg=1.0)
    assert set(rows) == {3}


def test_seeds_by_index():
    """A batch_index, as Latent From Batch leaves it: noise of the third and the fifth image."""
    import comfy.sample

    model = tiny.load("sd15")
    shape = shape_of("sd15", 2)

    def run(patched):
        latent = torch.zeros(shape)
        noise = comfy.sample.prepare_noise(latent, 7, [2, 4])
        positive, negative = tiny.text("sd15", seed=1), tiny.text("sd15", seed=2)
        return comfy.sample.sample(
            patched, noise, 2, 3.0, "euler", "simple", positive, negative, latent,
            disable_pbar=True, seed=7,
        )  # fmt: skip

    assert difference(run(patched(model)), run(model)) <= LIMIT


# --- caches


def test_easycache_sees_the_joined_output():
    from comfy_extras.nodes_easycache import EasyCacheNode

    def easy(model):
        return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]

    model = tiny.load("flux", heads=3)
    cached = easy(model)
    sampling = {"shape": shape_of("flux", 2), "steps": 8, "cfg": 1.0}
    expected = tiny.sample(cached, "flux", **sampling)
    assert difference(tiny.sample(model, "flux", **sampling), expected) > 1e-5, "nothing was reused"
    for both in (patched(cached), easy(patched(model))):
        assert difference(tiny.sample(both, "flux", **sampling), expected) <= 1e-5
        assert report(both)["batch"] == 2
        assert report(both)["calls_distributed"] < 8


STATIC = CacheConfig(strategy="scm", scm="2,1,1,2", scm_policy="static", warmup=0, engine="builtin",
                     front_blocks=1)  # fmt: skip


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_block_cache_decisions_reach_every_lane(family):
    """A static mask decides alike on one device."""
    model = tiny.load(family, heads=3)
    sampling = {"shape": shape_of(family, 2), "steps": 6}
    alone = apply_cache(model, STATIC)
    expected = tiny.sample(alone, family, **sampling)
    hits = run_log(alone).latest().to_json()["cache"]["hits"]
    assert hits > 0
    for devices, lanes in ((TWO, 2), ("cpu,cpu,cpu,cpu", 4)):
        both = patched(apply_cache(model, STATIC), devices)
        assert difference(tiny.sample(both, family, **sampling), expected) <= 2e-6
        found = run_log(both).latest().to_json()
        assert found["cache"]["hits"] == hits
        assert (found["parallel"]["batch"], found["parallel"]["calls_local"]) == (lanes, 0)


@pytest.mark.parametrize("strategy", ["fbcache", "taylorseer"])
def test_a_dynamic_cache_decides_for_all_lanes(strategy):
    model = tiny.load("wan", heads=3)
    config = CacheConfig(strategy=strategy, engine="builtin", warmup=1, front_blocks=1,
                         residual_diff_threshold=0.9)  # fmt: skip
    both = patched(apply_cache(model, config))
    out = tiny.sample(both, "wan", shape=shape_of("wan", 2), steps=8)
    assert torch.isfinite(out).all()
    found = run_log(both).latest().to_json()
    assert found["cache"]["hits"] > 0
    assert (found["parallel"]["batch"], found["parallel"]["calls_local"]) == (2, 0)


# --- faults


@contextmanager
def broken(worker_number):
    """One worker dies before its next call."""
    victim = pool().workers[worker_number].handle._process
    victim.kill()
    victim.wait()
    yield


def test_a_lane_that_dies_between_prompts_is_replaced():
    model = tiny.load("sd15")
    sampling = {"shape": shape_of("sd15", 2), "steps": 2}
    expected = tiny.sample(model, "sd15", **sampling)
    shared = patched(model)
    tiny.sample(shared, "sd15", **sampling)
    with broken(0):
        assert difference(tiny.sample(shared, "sd15", **sampling), expected) <= LIMIT
    assert report(shared)["calls_local"] == 0


def test_a_lane_that_dies_in_a_call_gives_a_sentence():
    model = tiny.load("sd15")
    sampling = {"shape": shape_of("sd15", 2), "steps": 3}
    expected = tiny.sample(model, "sd15", **sampling)
    shared = patched(model)
    network = shared.model.diffusion_model

    def kill(module, args):
        pool().workers[0].handle._process.kill()

    tiny.sample(shared, "sd15", **sampling)
    handle = network.register_forward_pre_hook(kill)
    try:
        with pytest.raises(WorkerError, match=r"ended with code -9 \(often out of memory\)"):
            tiny.sample(shared, "sd15", **sampling)
    finally:
        handle.remove()
    assert difference(tiny.sample(shared, "sd15", **sampling), expected) <= LIMIT


def test_a_cancel_ends_what_the_other_lanes_compute(monkeypatch):
    """They exchange nothing: only a word from this process ends them before their rows are done."""
    import comfy.model_management as management

    monkeypatch.setattr(Distributor, "deal", lambda self, layout, rows, branch=0: [1, rows - 1])
    shared = patched(tiny.load("sd15"))
    sampling = {"shape": (5, 4, 24, 24), "steps": 1, "cfg": 1.0}
    for _ in range(2):  # workers start in the first run
        started = time.monotonic()
        tiny.sample(shared, "sd15", **sampling)
        call_s = time.monotonic() - started
    kept = [worker.handle.pid for worker in pool().workers]

    def cancel(module, args):
        management.interrupt_current_processing()

    handle = shared.model.diffusion_model.register_forward_pre_hook(cancel)
    started = time.monotonic()
    try:
        with pytest.raises(management.InterruptProcessingException):
            tiny.sample(shared, "sd15", **sampling)
    finally:
        handle.remove()
    assert time.monotonic() - started < 0.8 * call_s
    assert [worker.handle.pid for worker in pool().workers] == kept
    tiny.sample(shared, "sd15", **sampling)
    assert report(shared)["calls_local"] == 0
