"""Our techniques on a core newer than the one that is installed: see tests/next_core.py.

The four networks are 0.33's. MiniMax-H3 is written for the compiler (its blocks write into their
input); the others stand for networks that newer cores may compile: there, only what we do beyond
the model alone counts.
"""

from contextlib import nullcontext

import next_core
import pytest
import tiny
import torch
from cache_runs import cached, section
from fake_kernels import FakeKernel, table
from forked_ranks import run_ranks
from next_core import FOREIGN, KEPT, LATE, PAUSED, NextCore
from shared_calls import U2, record, shared
from slipstream.backends import compiler, worker_host
from slipstream.backends.architectures import find
from slipstream.backends.architectures.plans import find_plan
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.offload.blocks import units_of
from slipstream.backends.offload.lane import InOrderLane
from slipstream.backends.offload.stream import Streamer
from slipstream.backends.run import run_log
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig

FAMILIES = ("minimax_h3", "qwen_image", "flux", "wan")
# ./test walks two: the one that newer cores compile, and one of two stacks.
SOME_FIRST = tuple(
    pytest.param(name, marks=[] if name in ("minimax_h3", "flux") else pytest.mark.full)
    for name in FAMILIES
)
STRATEGIES = (
    "auto", "scm", "fbcache", "taylorseer", "teacache", "pab", "output", "fastercache-cfg",
)  # fmt: skip
HAVE_TEACACHE = ("flux",)  # and it reuses something on random weights
STEPS = 10
LONGER_KINDS = [pytest.param(name, marks=pytest.mark.full) for name in ("refused", "several")]
ALL_KINDS = (KEPT, LATE, FOREIGN, PAUSED)
pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(autouse=True)
def _one_thread():
    """Operators on a few kilobytes: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def core(comfy, monkeypatch):
    return NextCore(monkeypatch)


def run(core, model, family, *, steps=STEPS, **how):
    """(what was recorded, the latent) of one run."""
    with core.recording() as recorder:
        latent = tiny.sample(model, family, steps=steps, **how)
    return recorder, latent


def compiled(core, family):
    """(a model whose network newer cores would record, the record of a run of it alone)."""
    model = tiny.load(family)
    core.compile(model.model.diffusion_model)
    plain, _ = run(core, model, family)
    assert plain.num_scopes > 2 * plain.num_begun > 0
    return model, plain


def with_kernel(model, *kernels, policy="balanced"):
    found, policies = table(*(kernels or (FakeKernel("fast"),)))
    config = AttentionConfig(policy=policy)
    return apply_attention(model, config, kernels=found, policies=policies)


def assert_only_core_offends(recorder, plain, *kinds, by_size=True):
    assert recorder.num_begun, "nothing was recorded"
    found = recorder.beyond(plain, kinds or ALL_KINDS, by_size=by_size)
    assert not found, "\n".join(found)


# --- the record itself


def test_minimax_h3_alone_does_nothing_that_the_record_cannot_stand(core):
    _, plain = compiled(core, "minimax_h3")
    assert not any(plain.calls), plain.calls


@pytest.mark.parametrize("kind", [KEPT, LATE, FOREIGN, PAUSED])
def test_the_record_sees(core, kind):
    kept = []
    with core.recording() as recorder:
        core.malloc_graph_begin(None)
        if kind == FOREIGN:
            kept.append(torch.zeros(5))
        core.prefetch_queue_pop(None, None, object())
        if kind != FOREIGN:
            kept.append(torch.zeros(5))
        if kind == PAUSED:
            with core.pause_malloc_graph():
                kept.clear()
        if kind == FOREIGN:
            kept.clear()
        core.prefetch_queue_pop(None, None, object())
        if kind == LATE:
            kept.clear()
        core.prefetch_queue_pop(None, None, None)
        core.malloc_graph_end()
    assert {offence.kind for offence in recorder.calls[0]} == {
        KEPT: {KEPT}, LATE: {KEPT, LATE}, FOREIGN: {FOREIGN}, PAUSED: {PAUSED},
    }[kind]  # fmt: skip


def test_what_is_made_while_paused_is_not_recorded_and_a_pause_is_no_count(core):
    with core.recording() as recorder:
        core.malloc_graph_begin(None)
        core.prefetch_queue_pop(None, None, object())
        with core.pause_malloc_graph():
            kept = [torch.zeros(5)]
            with core.pause_malloc_graph():
                pass
            kept.append(torch.zeros(7))  # recorded: core's inner pause has ended the outer one
        with compiler.unrecorded():
            with compiler.unrecorded():
                pass
            kept.append(torch.zeros(9))  # not recorded: ours counts
        core.malloc_graph_end()
    assert [offence.nbytes for offence in recorder.calls[0]] == [7 * 4]


# --- what techniques keep, with the compiler left on


@pytest.mark.parametrize("family", SOME_FIRST)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("attention", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_cache_keeps_nothing_of_a_block_in_the_record(core, family, strategy, attention):
    if strategy == "teacache" and family not in HAVE_TEACACHE:
        pytest.skip("teacache reuses nothing of this tiny model")
    core.obeys = False
    model, plain = compiled(core, family)
    patched = cached(model, strategy)
    if attention:
        patched = with_kernel(patched)
    recorder, _ = run(core, patched, family)
    assert section(patched)["blocks_skipped"] > 0, "nothing was reused"
    # Without the uncond branch, calls have half the batch.
    by_size = strategy != "fastercache-cfg"
    assert_only_core_offends(recorder, plain, KEPT, LATE, PAUSED, by_size=by_size)


@pytest.mark.parametrize("strategy", ["auto", "pab"])
def test_without_unrecorded_the_record_complains(core, monkeypatch, strategy):
    """The negative control of the tests above."""
    core.obeys = False
    model, plain = compiled(core, "minimax_h3")
    monkeypatch.setattr(compiler, "_paused", lambda pause: nullcontext())
    recorder, _ = run(core, cached(model, strategy), "minimax_h3")
    assert recorder.beyond(plain, (KEPT,))
    assert recorder.num_paused == 0


def test_pausing_alone_would_not_save_a_cache(core):
    """A reused call replaces a block's input, which is then freed in another block's scope: this
    is why such runs have the compiler off."""
    core.obeys = False
    model, plain = compiled(core, "minimax_h3")
    recorder, _ = run(core, cached(model, "auto"), "minimax_h3")
    assert recorder.beyond(plain, (FOREIGN,))


# --- techniques that leave the compiler on


def kernels(kind):
    return {
        "good": [FakeKernel("good")],
        "refused": [FakeKernel("wrong", error=0.5)],
        "raises": [FakeKernel("broken", raises=RuntimeError("no kernel image"))],
        "nan": [FakeKernel("nan", bad=range(4, 400))],
        "several": [FakeKernel("a"), FakeKernel("b", error=0.004), FakeKernel("c", "exact")],
    }[kind]


@pytest.mark.parametrize("family", SOME_FIRST)
@pytest.mark.parametrize("kind", ["good", "raises", "nan", *LONGER_KINDS])
@pytest.mark.parametrize("newest", [False, pytest.param(True, marks=pytest.mark.full)])
def test_attention_does_nothing_that_the_record_cannot_stand(
    core, monkeypatch, family, kind, newest
):
    if newest:
        next_core.use_newest_attention(monkeypatch)
    model, plain = compiled(core, family)
    recorder, _ = run(core, with_kernel(model, *kernels(kind)), family)
    assert_only_core_offends(recorder, plain)
    assert core.seen_switch == [False] * len(core.seen_switch)


@pytest.mark.parametrize("family", SOME_FIRST)
def test_offload_does_nothing_that_the_record_cannot_stand(core, family):
    """Its streamer with copies in order, which are then made inside the blocks' scopes."""
    model, plain = compiled(core, family)
    network = model.model.diffusion_model
    streamers = []

    def streamed(executor, *args, **kwargs):
        if not streamers:
            units = units_of(network, find(network))
            cpu = torch.device("cpu")
            streamers.append(Streamer(units, cpu, depth=1, lane=InOrderLane()))
        with streamers[0].call(lambda block: (set(range(block + 1, 99)), True), None):
            return executor(*args, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key("apply_model", "test", streamed)
    recorder, _ = run(core, patched, family)
    assert streamers[0].num_copies > 0
    assert_only_core_offends(recorder, plain)


# --- the switch


@pytest.mark.parametrize("strategy", ["auto", "pab"])
def test_a_run_that_keeps_tensors_has_the_compiler_off(core, strategy):
    model, _ = compiled(core, "minimax_h3")
    patched = cached(model, strategy)
    recorder, _ = run(core, patched, "minimax_h3")
    assert (recorder.num_begun, set(core.seen_switch)) == (0, {True})
    assert core.args.disable_comfy_compiler is False
    sentence = "ComfyUI's compiler is off for this run: cache keeps tensors across blocks"
    assert run_log(patched).latest().notes[sentence] == 1


@pytest.mark.parametrize("strategy", [None, "output", "fastercache-cfg"])
def test_other_runs_keep_the_compiler(core, strategy):
    model, _ = compiled(core, "minimax_h3")
    patched = with_kernel(model) if strategy is None else cached(model, strategy)
    recorder, _ = run(core, patched, "minimax_h3")
    assert recorder.num_begun > 0
    assert not any("compiler" in note for note in run_log(patched).latest().notes)


def test_a_user_who_has_it_off_keeps_it_off_and_reads_nothing_about_it(core):
    model = tiny.load("minimax_h3")
    core.args.disable_comfy_compiler = True
    patched = cached(model, "auto")
    run(core, patched, "minimax_h3")
    assert core.args.disable_comfy_compiler is True
    assert not any("compiler" in note for note in run_log(patched).latest().notes)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, "interrupt"])
def test_it_is_on_again_after_an_exception_and_an_interrupt(core, error):
    import comfy.model_management as management

    if error == "interrupt":
        error = management.InterruptProcessingException

    def stop(step, *_):
        if step == 3:
            raise error("stop")

    model, _ = compiled(core, "minimax_h3")
    with pytest.raises(error), core.recording():
        tiny.sample(cached(model, "auto"), "minimax_h3", steps=STEPS, callback=stop)
    assert set(core.seen_switch) == {True}
    assert core.args.disable_comfy_compiler is False


def test_a_run_inside_a_run_does_not_turn_it_on_again(core):
    model, _ = compiled(core, "minimax_h3")
    outer, inner = cached(model, "auto"), cached(tiny.load("minimax_h3"), "pab")

    def sample_another(step, *_):
        if step == 2:
            tiny.sample(inner, "minimax_h3", steps=STEPS)
            assert core.args.disable_comfy_compiler is True

    run(core, outer, "minimax_h3", callback=sample_another)
    assert set(core.seen_switch) == {True}
    assert core.args.disable_comfy_compiler is False


def test_sequence_parallel_has_it_off_in_every_process(core):
    model = tiny.load("minimax_h3", heads=3)
    core.compile(model.model.diffusion_model)
    config = SequenceParallelConfig(devices="cpu,cpu", timeout_s=60)
    patched = apply_parallel(model, config)
    try:
        recorder, _ = run(core, patched, "minimax_h3", steps=2)
    finally:
        pool().close()
    found = run_log(patched).latest()
    assert found.to_json()["parallel"]["calls_distributed"] > 0
    assert (recorder.num_begun, set(core.seen_switch)) == (0, {True})
    assert core.args.disable_comfy_compiler is False
    assert worker_host.comfyui_arguments()["disable_comfy_compiler"] is True
    sentence = "ComfyUI's compiler is off for this run: parallel keeps tensors across blocks"
    assert found.notes[sentence] == 1


def test_sequence_parallel_on_one_device_leaves_it_on(core):
    model, _ = compiled(core, "minimax_h3")
    recorder, _ = run(core, apply_parallel(model, SequenceParallelConfig()), "minimax_h3")
    assert recorder.num_begun > 0


def test_qwen_image_21s_own_cache_is_off_while_blocks_are_reused(core):
    """On a network of that name: 0.33 does not have the real one."""
    model = tiny.load("qwen_image")
    network = model.model.diffusion_model
    network.__class__ = type("QwenImage21Transformer2DModel", (type(network),), {})
    seen = []

    def look(executor, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        seen.append(options.get("qwen_image21_cache"))
        return executor(*args, **kwargs)

    chosen = {"device": "gpu", "dtype": "int8"}
    model.model_options["transformer_options"]["qwen_image21_cache"] = chosen
    for keeps in (True, False):
        patched = cached(model, "auto") if keeps else with_kernel(model)
        patched.add_wrapper_with_key("diffusion_model", "test", look)
        tiny.sample(patched, "qwen_image", steps=STEPS)
        noted = any("own cache" in note for note in run_log(patched).latest().notes)
        assert noted is keeps
        assert {one["device"] for one in seen} == {"off" if keeps else "gpu"}
        assert {one["dtype"] for one in seen} == {"int8"}
        seen.clear()
    assert chosen == {"device": "gpu", "dtype": "int8"}, "the MODEL's own options were changed"


@pytest.mark.parametrize("family", SOME_FIRST)
def test_exchanges_keep_nothing_of_a_block_in_the_record(core, family):
    """Two ranks with the compiler left on; a rank's rows are half of the model's alone."""
    recorded = record(family, heads=3)
    plan = find_plan(recorded.network)
    core.compile(recorded.network)
    with core.recording() as plain:
        recorded.run({})

    def body(rank):
        with core.recording() as recorder:
            shared(recorded, rank, U2, "next core", plan)
        found = recorder.beyond(plain, (KEPT, LATE, PAUSED), by_size=False)
        return recorder.num_begun, recorder.num_paused, found

    for num_begun, num_paused, found in run_ranks(2, body):
        assert num_begun == 1
        assert num_paused > 0
        assert not found, "\n".join(found)


# --- attention as newer cores call it


@pytest.mark.parametrize("family", SOME_FIRST)
def test_containers_for_every_model_change_nothing(core, monkeypatch, family):
    model = tiny.load(family)
    ours = {
        "attention": with_kernel(model), "pab": cached(model, "pab"),
        "both": cached(with_kernel(model), "pab"),
    }  # fmt: skip
    plain = tiny.sample(model, family, steps=STEPS)
    expected = {name: tiny.sample(one, family, steps=STEPS) for name, one in ours.items()}
    answered = next_core.use_newest_attention(monkeypatch)
    assert same(tiny.sample(model, family, steps=STEPS), plain)
    for name, one in ours.items():
        answered.clear()
        assert same(tiny.sample(one, family, steps=STEPS), expected[name]), name
        who = "container_function" if name == "attention" else "override"
        assert answered[who] > 0, (name, answered)


def test_an_override_takes_a_layers_own_attention_away(core, monkeypatch):
    """What newest core does, and what the attention node has to make up for."""
    from comfy.ldm.modules import attention

    def own(*args, **kwargs):
        tensors = [box.take() for box in args[:3]]
        return attention.attention_pytorch(*tensors, *args[3:], **kwargs)

    answered = next_core.use_newest_attention(monkeypatch, next_core.Preferred(own))
    model = tiny.load("flux")
    tiny.sample(model, "flux")
    assert answered["preferred"] > 0
    answered.clear()
    tiny.sample(with_kernel(model), "flux")
    assert answered["preferred"] == 0


def test_the_node_leaves_calls_to_what_the_checkpoint_prefers_there(core, monkeypatch):
    """And says so; a kernel that is chosen for a layer answers all the same."""
    from comfy.ldm.modules import attention

    class ComfyAttention(torch.nn.Module):
        """As ComfyUI 0.40 has it: read from the file, beside a layer's weights."""

        function = None

    num_own = 0

    def own(*args, **kwargs):
        nonlocal num_own
        num_own += 1
        boxes = isinstance(args[0], attention.AttentionTensorContainer)
        tensors = [box.take() for box in args[:3]] if boxes else args[:3]
        return attention.attention_pytorch.__wrapped__(*tensors, *args[3:], **kwargs)

    monkeypatch.setattr(attention, "ComfyAttention", ComfyAttention, raising=False)
    next_core.use_newest_attention(monkeypatch)
    model = tiny.load("flux")
    plain = tiny.sample(model, "flux", steps=STEPS, cfg=1.0)
    for block in model.model.diffusion_model.double_blocks:
        block.img_attn.comfy_attention = ComfyAttention()
        block.img_attn.comfy_attention.function = own
    num_layers = len(model.model.diffusion_model.double_blocks)

    refused = with_kernel(model, FakeKernel("no", refuse="never"))
    assert same(tiny.sample(refused, "flux", steps=STEPS, cfg=1.0), plain)
    assert num_own == num_layers * STEPS
    found = run_log(refused).latest().to_json()["attention"]
    (remark,) = [s for s in found["reasons"] if "checkpoint asks for" in s]
    assert f"{num_layers} layers" in remark
    assert found["calls"]["comfyui:own"] == num_layers * STEPS
    assert found["label"] == "unknown"

    num_own = 0
    exact = with_kernel(model, FakeKernel("no", refuse="never"), policy="exact")
    tiny.sample(exact, "flux", steps=STEPS, cfg=1.0)
    assert num_own == 0
    kernel = FakeKernel("fast")
    tiny.sample(patched_open(model, kernel), "flux", steps=STEPS, cfg=1.0)
    assert kernel.num_runs > 0
    assert num_own == 0


def patched_open(model, kernel):
    """Every call may be the kernel's."""
    found, policies = table(kernel)
    config = AttentionConfig(
        min_tokens=0, dense_first_steps=0, dense_last_steps=0, autotune=False, probe=False
    )
    return apply_attention(model, config, kernels=found, policies=policies)


def same(a, b):
    parts = (a.unbind(), b.unbind()) if getattr(a, "is_nested", False) else ((a,), (b,))
    return all(torch.equal(x, y) for x, y in zip(*parts, strict=True))
