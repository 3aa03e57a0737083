"""Sequence parallel in ComfyUI's own sampler, with real worker processes on the CPU."""

import gc
import os

import pytest
import tiny
import torch
from patience import patience
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.conflicts import ConflictError
from slipstream.backends.run import run_log
from slipstream.parallel import workers as workers_module
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import ParallelError, SequenceParallelConfig
from slipstream.parallel.messages import Ping
from slipstream.parallel.workers import WorkerError, ask

pytestmark = [
    pytest.mark.usefixtures("comfy", "workers"),
    pytest.mark.skipif(os.name == "nt", reason="/proc"),
]
THREE = "cpu,cpu,cpu"


@pytest.fixture(scope="module")
def workers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    pool().close()
    torch.set_num_threads(threads)


def patched(model, devices=THREE, **fields):
    fields = {"timeout_s": 30, **fields}
    return apply_parallel(model, SequenceParallelConfig(devices=devices, **fields))


def report(model):
    return run_log(model).latest().to_json()["parallel"]


def notes(model):
    return run_log(model).latest().notes


def difference(a, b):
    a, b = (list(t.unbind()) if t.is_nested else [t] for t in (a, b))
    scale = max(t.abs().max() for t in b)
    return max((x - y).abs().max() for x, y in zip(a, b, strict=True)) / scale


def assert_shared(model, family, expected, *, calls=None, **sampling):
    """The run agrees with one device, and all its calls were shared."""
    out = tiny.sample(model, family, **sampling)
    found = report(model)
    assert difference(out, expected) <= 2e-6
    assert found["calls_local"] == 0, found["reasons"]
    assert found["calls_distributed"] == calls if calls else found["calls_distributed"] > 0
    return found


# --- families through their loaders, sampler and conditioning


@pytest.mark.parametrize(
    "family", ["wan", "wan_vace", "flux", "hunyuan_video", "sd3", "ltxv", "ltxav", "minimax_h3"]
)
def test_a_run_agrees_with_one_device(family):
    model = tiny.load(family, heads=3)
    expected = tiny.sample(model, family)
    found = assert_shared(patched(model), family, expected)
    assert (found["workers"], found["ulysses"], found["cfg"]) == (3, 3, 1)
    assert torch.equal(_flat(tiny.sample(model, family)), _flat(expected)), "the model changed"


def _flat(latent):
    return torch.cat([t.flatten() for t in latent.unbind()]) if latent.is_nested else latent


def test_cfg_halves_with_equal_and_unequal_prompts():
    model = tiny.load("wan", heads=3)
    for split in (False, True):
        expected = tiny.sample(model, "wan", split=split, cfg=4.0)
        for widgets in ({}, {"cfg": 2}):  # prompts of one length are rows of one call
            lanes = ("batch" if not split and not widgets else "cfg", 2)
            two = patched(model, "cpu,cpu", **widgets)
            found = assert_shared(two, "wan", expected, split=split, cfg=4.0)
            assert found[lanes[0]] == lanes[1]
            four = patched(model, "cpu,cpu,cpu,cpu", **widgets)
            found = assert_shared(four, "wan", expected, split=split, cfg=4.0)
            assert (found[lanes[0]], found["ulysses"], found["workers"]) == (2, 2, 4)


def test_one_prompt_uses_all_for_the_tokens():
    model = tiny.load("wan", heads=3)
    expected = tiny.sample(model, "wan", cfg=1.0)
    found = assert_shared(patched(model, "cpu,cpu"), "wan", expected, cfg=1.0, calls=2)
    assert (found["cfg"], found["ulysses"]) == (1, 2)


def test_heun_and_a_second_run_of_the_same_model():
    model = tiny.load("flux", heads=3)
    expected = tiny.sample(model, "flux", sampler="heun", steps=3)
    shared = patched(model)
    for _ in range(2):
        assert_shared(shared, "flux", expected, sampler="heun", steps=3, calls=5)


def test_cfg_on_a_network_without_wrappers():
    model = tiny.load("sd35", heads=3)
    expected = tiny.sample(model, "sd35", split=True)
    assert_shared(patched(model, "cpu,cpu"), "sd35", expected, split=True)
    assert "forward" not in model.model.diffusion_model.__dict__


# --- weights


def lora(model, kind, seed=3):
    """A patch of one kind on every query projection, through ComfyUI's own LoRA code."""
    import comfy.sd

    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {}
    for key, value in model.model.state_dict().items():
        if not key.endswith("self_attn.q.weight"):
            continue
        name, (rows, columns) = key.removesuffix(".weight"), value.shape
        if kind in ("lora", "dora"):
            weights[f"{name}.lora_A.weight"] = randn(4, columns)
            weights[f"{name}.lora_B.weight"] = randn(rows, 4)
        if kind == "dora":
            weights[f"{name}.dora_scale"] = randn(rows, 1).abs() + 1
        if kind == "lokr":
            weights[f"{name}.lokr_w1"] = randn(4, 4)
            weights[f"{name}.lokr_w2"] = randn(rows // 4, columns // 4)
        if kind == "loha":
            weights.update({
                f"{name}.hada_w1_a": randn(rows, 4), f"{name}.hada_w1_b": randn(4, columns),
                f"{name}.hada_w2_a": randn(rows, 4), f"{name}.hada_w2_b": randn(4, columns),
            })  # fmt: skip
        if kind == "diff":
            weights[f"{name}.diff"] = randn(rows, columns) * 0.1
    found, _ = comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0)
    assert found.patches
    return found


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha", "diff"])
def test_weight_patches_follow(kind):
    model = tiny.load("wan", heads=3)
    plain = tiny.sample(model, "wan")
    with_lora = lora(model, kind)
    expected = tiny.sample(with_lora, "wan")
    assert difference(expected, plain) > 1e-4, "the patch changes nothing"
    assert_shared(patched(with_lora), "wan", expected)


def test_lora_before_after_changed_and_removed():
    model = tiny.load("wan", heads=3)
    plain, one, other = (
        tiny.sample(m, "wan") for m in (model, lora(model, "lora"), lora(model, "lora", 4))
    )
    assert difference(one, other) > 1e-4
    assert_shared(patched(lora(model, "lora")), "wan", one)
    assert_shared(lora(patched(model), "lora"), "wan", one)
    assert_shared(patched(lora(model, "lora", 4)), "wan", other)
    assert_shared(patched(model), "wan", plain)


def test_unchanged_patches_are_sent_once(monkeypatch):
    from slipstream.parallel import apply

    encodings = []
    real = apply.encode_patches

    def counted(patches, parts):
        encodings.append(len(patches))
        return real(patches, parts)

    model = lora(tiny.load("wan", heads=3), "lora")
    shared = patched(model)
    tiny.sample(shared, "wan")
    monkeypatch.setattr(apply, "encode_patches", counted)
    tiny.sample(shared, "wan")
    assert encodings == []
    other = patched(lora(tiny.load("wan", heads=3), "lora", 4))
    tiny.sample(other, "wan")
    assert len(encodings) == 1


def test_two_models_alternate_and_stay_warm():
    """Wan 2.2's high and low noise models."""
    models = [tiny.load("wan", heads=3, seed=seed) for seed in (0, 1)]
    expected = [tiny.sample(m, "wan") for m in models]
    assert difference(*expected) > 1e-3
    shared = [patched(m) for m in models]
    for _ in range(2):
        for model, out in zip(shared, expected, strict=True):
            assert_shared(model, "wan", out)
    assert len(pool().workers[0].models) >= 2


def test_four_workers_need_hardly_more_memory_than_one():
    """Weights are mapped from the file, whose pages all workers share; beyond the fixed cost."""
    model = tiny.load("wan", heads=6, seed=7)
    file_bytes = model.model_size()
    five = ",".join(["cpu"] * 5)
    small = patched(tiny.load("wan", heads=3, seed=7), five)
    tiny.sample(small, "wan")
    before = ask(pool().workers[:4], Ping(), timeout_s=10)
    tiny.sample(patched(model, five), "wan", steps=1)
    after = ask(pool().workers[:4], Ping(), timeout_s=10)
    own = []
    for was, now in zip(before, after, strict=True):
        assert now["models"] == was["models"] + 1
        own.append(now["private_bytes"] - was["private_bytes"])
    assert file_bytes > 1e8
    assert sum(own) + file_bytes <= 1.3 * (max(min(own), 0) + file_bytes), own


def test_a_file_that_changed_after_it_was_loaded(tmp_path):
    """Workers would sample another model than ComfyUI does."""
    import comfy.sd

    path = tiny.write(tmp_path, "wan", heads=3, seed=11)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    tiny.write(tmp_path, "wan", heads=3, seed=12)
    sentence = "tiny_wan.safetensors has changed since ComfyUI loaded it: load it again"
    with pytest.raises(WorkerError, match=sentence) as caught:
        tiny.sample(patched(model), "wan")
    assert "worker.py" in str(caught.value), "the worker's traceback"
    tiny.write(tmp_path, "wan", heads=3, seed=11)
    assert_shared(patched(model), "wan", tiny.sample(model, "wan"))


def test_the_print_ignores_weights_that_another_clone_has_patched():
    model = tiny.load("wan", heads=3, seed=13)
    tiny.sample(lora(model, "lora"), "wan")  # its patches stay on the weights until another run
    assert model.backup
    pool().unload(next(iter(pool().workers[0].models), ""))
    tiny.sample(patched(model), "wan")


def worker_facts():
    return ask(pool().workers, Ping(), timeout_s=10)[0]


def test_free_takes_models_off_the_workers_devices():
    """/free runs outside of a prompt. The weights stay mapped: the next prompt reads no file."""
    import comfy.model_management as management

    shared = patched(tiny.load("wan", heads=3))
    tiny.sample(shared, "wan")
    before = worker_facts()
    assert before["num_on_device"] > 0
    management.unload_all_models()
    after = worker_facts()
    assert after["num_on_device"] == 0
    assert after["models"] == before["models"]
    tiny.sample(shared, "wan")
    assert report(shared)["calls_local"] == 0


def test_room_for_another_model_leaves_the_workers_alone():
    """What load_models_gpu does in a prompt when VRAM is short: two experts would take turns."""
    import comfy.model_management as management
    from comfy_execution.utils import CurrentNodeContext

    shared = patched(tiny.load("wan", heads=3))
    tiny.sample(shared, "wan")
    before = worker_facts()
    with CurrentNodeContext("prompt", "node"):
        management.free_memory(1e15, shared.load_device)
    assert not management.current_loaded_models
    after = worker_facts()
    assert all(after[name] == before[name] for name in ("models", "num_on_device"))
    with CurrentNodeContext("prompt", "node"):
        tiny.sample(shared, "wan")
    assert report(shared)["calls_local"] == 0


def test_two_experts_are_loaded_once_in_three_prompts(monkeypatch):
    """Wan 2.2: high and low noise take turns, and each makes room for the other."""
    import comfy.model_management as management
    from comfy_execution.utils import CurrentNodeContext

    sent = []
    send = workers_module.Worker.send

    def record(worker, message, tensors=()):
        sent.append((worker.number, type(message).__name__, getattr(message, "key", "")))
        send(worker, message, tensors)

    monkeypatch.setattr(workers_module.Worker, "send", record)
    experts = [patched(tiny.load("wan", heads=3, seed=seed)) for seed in (91, 92)]
    for _ in range(3):
        for expert in experts:
            with CurrentNodeContext("prompt", "node"):
                management.free_memory(1e15, expert.load_device)
                tiny.sample(expert, "wan", steps=2)
            assert report(expert)["calls_local"] == 0
    loads = [(number, key) for number, kind, key in sent if kind == "Load"]
    assert len(loads) == len(set(loads)) == 2 * len({number for number, _ in loads})
    assert not [
        one for one in sent if one[1] in ("Unload", "Park") and one[2] in dict(loads).values()
    ]


def test_a_model_that_nobody_has_any_more_leaves_the_workers():
    shared = patched(tiny.load("wan", heads=3, seed=77))
    tiny.sample(shared, "wan")
    key = next(reversed(pool().workers[0].models))
    del shared
    gc.collect()
    tiny.sample(patched(tiny.load("wan", heads=3)), "wan")
    assert key not in pool().workers[0].models


# --- composition


def test_attention_policy_runs_in_every_rank():
    model = tiny.load("wan", heads=3)
    exact = AttentionConfig(policy="exact", min_tokens=0, autotune=False)
    expected = tiny.sample(apply_attention(model, exact), "wan")
    for both in (patched(apply_attention(model, exact)), apply_attention(patched(model), exact)):
        assert_shared(both, "wan", expected)


STATIC = CacheConfig(strategy="scm", scm="2,1,1,2", scm_policy="static", warmup=0, engine="builtin",
                     front_blocks=1)  # fmt: skip


@pytest.mark.parametrize("family", ["wan", "flux", "sd3"])
def test_block_cache_decisions_are_rank_0s(family):
    """A static mask decides alike on one device, so the latents must agree."""
    model = tiny.load(family, heads=3)
    alone = apply_cache(model, STATIC)
    expected = tiny.sample(alone, family, steps=6)
    skipped = run_log(alone).latest().to_json()["cache"]
    for both in (patched(apply_cache(model, STATIC)), apply_cache(patched(model), STATIC)):
        assert_shared(both, family, expected, steps=6)
        assert run_log(both).latest().to_json()["cache"]["hits"] == skipped["hits"]
    assert difference(tiny.sample(model, family, steps=6), expected) > 1e-5, "nothing was reused"


@pytest.mark.parametrize("strategy", ["fbcache", "cache-dit", "taylorseer"])
def test_dynamic_caches_agree_among_ranks(strategy):
    model = tiny.load("wan", heads=3)
    config = CacheConfig(strategy=strategy, engine="builtin", warmup=1, front_blocks=1,
                         residual_diff_threshold=0.9)  # fmt: skip
    both = patched(apply_cache(model, config))
    for _ in range(2):
        out = tiny.sample(both, "wan", steps=8, split=True)
        assert torch.isfinite(out).all()
        found = run_log(both).latest().to_json()
        assert found["cache"]["hits"] > 0
        assert found["parallel"]["calls_local"] == 0


def test_cache_and_cfg_halves_use_the_tokens_instead():
    model = tiny.load("wan", heads=3)
    both = patched(apply_cache(model, STATIC), "cpu,cpu")
    tiny.sample(both, "wan", steps=6)
    assert report(both)["cfg"] == 1
    assert report(both)["calls_local"] == 0


def test_svdquant_models_load_in_workers(tmp_path):
    """Ulysses changes no arithmetic; ring rounds otherwise, which 4-bit activations amplify."""
    import svdquant_models
    from slipstream.backends.svdquant.host import load_svdquant

    svdquant_models.write_tiny(tmp_path)
    model = load_svdquant(str(next(tmp_path.iterdir())))
    expected = tiny.sample(model, "flux")
    shared = patched(model, "cpu,cpu", cfg=1, ulysses=2)
    assert torch.equal(tiny.sample(shared, "flux"), expected)
    assert report(shared)["calls_distributed"] == 2


# --- what stays on one device, with a sentence


def test_one_worker_is_an_exact_passthrough():
    model = tiny.load("wan", heads=3)
    expected = tiny.sample(model, "wan")
    one = apply_parallel(model, SequenceParallelConfig(workers=1))
    assert torch.equal(tiny.sample(one, "wan"), expected)
    assert run_log(one) is None
    again = apply_parallel(patched(model), SequenceParallelConfig(workers=1))
    assert torch.equal(tiny.sample(again, "wan"), expected)


def test_automatic_without_a_second_device_is_a_passthrough():
    model = tiny.load("wan", heads=3)
    auto = apply_parallel(model, SequenceParallelConfig())
    assert torch.equal(tiny.sample(auto, "wan"), tiny.sample(model, "wan"))
    assert any("one device" in note for note in notes(auto))


def test_the_kill_switch(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_DISABLE", "parallel")
    model = tiny.load("wan", heads=3)
    shared = patched(model)
    assert torch.equal(tiny.sample(shared, "wan"), tiny.sample(model, "wan"))
    assert "parallel" not in run_log(shared).latest().to_json()


def test_one_row_of_an_unknown_architecture_runs_on_one_device():
    model = tiny.load("sd15")
    shared = patched(model)
    expected = tiny.sample(model, "sd15", cfg=1.0)
    assert torch.equal(tiny.sample(shared, "sd15", cfg=1.0), expected)
    assert any(note.startswith("No token plan for class UNetModel") for note in notes(shared))
    assert report(shared)["calls_distributed"] == 0


def test_tokens_between_renamed_blocks_are_not_shared():
    model = tiny.load("wan", heads=3)
    expected = tiny.sample(model, "wan")
    network = model.model.diffusion_model
    network.end, network.head = network.head, None
    type(network).head_before = None
    network.__dict__["_modules"].pop("head")
    object.__setattr__(network, "head", network.end)
    found = assert_shared(patched(model, "cpu,cpu"), "wan", expected)
    assert (found["batch"], found["ulysses"]) == (2, 1), "rows need no plan"
    shared = patched(model, batch=1)
    assert torch.equal(tiny.sample(shared, "wan", cfg=1.0), tiny.sample(model, "wan", cfg=1.0))
    assert any("WanModel has no 'head'" in note for note in notes(shared))


def test_tokens_of_a_renamed_argument_are_not_shared():
    """As after an update of ComfyUI: the blocks' `freqs` has another name."""
    model = tiny.load("wan", heads=3)
    expected = tiny.sample(model, "wan", cfg=1.0)
    block_class = type(model.model.diffusion_model.blocks[0])

    class Renamed(block_class):
        def forward(self, x, e, rope, context, context_img_len=257, transformer_options=None):
            return super().forward(x, e, rope, context, context_img_len, transformer_options)

    def rename(module, args, kwargs):
        kwargs["rope"] = kwargs.pop("freqs")
        return args, kwargs

    for block in model.model.diffusion_model.blocks:
        block.__class__ = Renamed
        block.register_forward_pre_hook(rename, with_kwargs=True)
    shared = patched(model)
    assert torch.equal(tiny.sample(shared, "wan", cfg=1.0), expected)
    assert any("forward has no 'freqs'" in note for note in notes(shared)), notes(shared)
    assert report(shared)["calls_distributed"] == 0


def test_a_loader_that_workers_cannot_repeat():
    model = tiny.load("chroma", heads=3)  # built in memory
    with pytest.raises(ParallelError, match="Use a core loader or ours"):
        tiny.sample(patched(model), "chroma")


def test_patches_of_blocks_make_calls_local():
    model = tiny.load("flux", heads=3)
    seen = []

    def patch(args):
        seen.append(1)
        return args

    model.set_model_patch(patch, "post_input")
    shared = patched(model)
    out = tiny.sample(shared, "flux")
    assert torch.equal(out, tiny.sample(model, "flux"))
    found = report(shared)
    assert found["calls_distributed"] == 0
    assert list(found["reasons"]) == ["patches of the model's blocks (post_input) cannot travel"]


def test_merged_models_stay_on_one_device():
    model, other = (tiny.load("wan", heads=3, seed=seed) for seed in (0, 1))
    merged = model.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    shared = patched(merged)
    assert torch.equal(tiny.sample(shared, "wan"), tiny.sample(merged, "wan"))
    assert any("cannot travel to workers" in note for note in notes(shared))


def test_compiled_models_are_refused():
    shared = patched(tiny.load("wan", heads=3))
    shared.add_wrapper_with_key("apply_model", "torch.compile", lambda ex, *a, **k: ex(*a, **k))
    with pytest.raises(ConflictError, match=r"remove torch\.compile"):
        tiny.sample(shared, "wan")


def test_a_worker_ends_with_its_parent_and_is_replaced_with_a_progress_bar(monkeypatch):
    """Of a parent that dies in whatever way, a worker sees the end of its stdin."""
    import comfy.utils

    shown = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, *_, **__: shown.append((value, total)),
    )
    model = tiny.load("wan", heads=3)
    shared = patched(model, "cpu,cpu")
    expected = tiny.sample(model, "wan")
    assert_shared(shared, "wan", expected)
    before = list(pool().workers)  # those of larger worlds too, or one of them would stand in
    for worker in before:
        worker.handle._process.stdin.close()
    for worker in before:
        assert worker.handle._process.wait(timeout=2 * patience()) == 1
    shown.clear()
    assert_shared(shared, "wan", expected)
    assert not set(before) & set(pool().workers)
    assert (1, 1) in shown, "one worker of one has started"


def test_a_cancel_within_a_step():
    import comfy.model_management as management

    model = tiny.load("wan", heads=3)
    shared = patched(model)
    tiny.sample(shared, "wan", steps=1)
    kept = [w.handle.pid for w in pool().workers]

    def cancel(step, *_):
        if step == 1:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        tiny.sample(shared, "wan", steps=6, callback=cancel)
    assert [w.handle.pid for w in pool().workers] == kept
    assert_shared(shared, "wan", tiny.sample(model, "wan"))


def test_nothing_stays_on_the_network():
    shared = patched(tiny.load("flux", heads=3))
    tiny.sample(shared, "flux")
    network = shared.model.diffusion_model
    hooks = [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert not any("forward" in m.__dict__ for m in network.modules())
