"""Decisions inside compiled graphs: what ComfyUI's TorchCompileModel does, on the stand-in.

backend="eager" stands in for inductor: what is under test is tracing and guards.
"""

import fake_kernels
import pytest
import torch
from fake_kernels import FakeKernel
from fake_patcher import FakeModel, FakeNet, FakePatcher, sample
from slipstream.backends.attention import op
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.run import run_log

NOISE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
OPEN = {"min_tokens": 0, "dense_first_steps": 0, "dense_last_steps": 0, "autotune": False}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(patcher):
    """Core's TorchCompileModel: the network is swapped for a compiled one around APPLY_MODEL."""

    def without_options(entries):
        return ["transformer_options" not in entry.name for entry in entries]

    net = torch.compile(
        patcher.model.diffusion_model, backend="eager", options={"guard_filter_fn": without_options}
    )

    def swap(executor, *args, **kwargs):
        model = executor.class_obj
        plain = model.diffusion_model
        model.__dict__["diffusion_model"] = net
        try:
            return executor(*args, **kwargs)
        finally:
            del model.__dict__["diffusion_model"]
            assert model.diffusion_model is plain

    clone = patcher.clone()
    clone.add_wrapper_with_key("apply_model", "torch.compile", swap)
    return clone


def patched(kernel, model, **settings):
    known, policies = fake_kernels.table(kernel)
    config = AttentionConfig(**{**OPEN, **settings})
    return apply_attention(model, config, kernels=known, policies=policies)


def calls(model):
    return run_log(model).latest().to_json()["attention"]["calls"]


def fake(seed=0):
    return FakePatcher(FakeModel(FakeNet(seed=seed)))


def test_schedule_and_counters_survive_compilation():
    kernel = FakeKernel("quick")
    model = compiled(patched(kernel, fake(), dense_first_steps=1, dense_last_steps=1))
    for _ in range(2):
        sample(model, NOISE, steps=4)
        assert calls(model) == {"comfyui:plain": 8, "quick": 8}
    layers = run_log(model).latest().to_json()["attention"]["layers"]
    assert [layer["block"] for layer in layers] == [
        "double/0", "double/0.1", "double/1", "double/1.1"
    ]  # fmt: skip


def test_one_graph_serves_two_applications_and_the_plain_model():
    base = fake()
    plain = sample(base, NOISE, steps=3)
    one, two = FakeKernel("one", error=0.02), FakeKernel("two", error=0.04)
    first, second = (compiled(patched(k, base, max_rel_l1=1.0)) for k in (one, two))
    out_one = sample(first, NOISE, steps=3)
    out_two = sample(second, NOISE, steps=3)
    assert calls(first) == {"one": 12}
    assert calls(second) == {"two": 12}
    assert not torch.allclose(out_one, out_two, atol=1e-4)
    assert torch.allclose(sample(compiled(base), NOISE, steps=3), plain, atol=1e-5)


def test_one_graph_serves_two_models_of_one_class():
    """torch 2.11 shares the graph between models: a handle per model would pick the wrong run."""
    one, two = FakeKernel("one"), FakeKernel("two")
    first, second = compiled(patched(one, fake(1))), compiled(patched(two, fake(2)))
    want = sample(patched(FakeKernel("x"), fake(2)), NOISE, steps=2)
    sample(first, NOISE, steps=2)
    graphs = (
        len(torch._dynamo.utils.counters["stats"])
        and torch._dynamo.utils.counters["stats"]["unique_graphs"]
    )
    out = sample(second, NOISE, steps=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.allclose(out, want, atol=1e-5)
    assert calls(first) == {"one": 8}
    assert calls(second) == {"two": 8}


def test_unbound_op_computes_the_default():
    op.register()
    q = torch.randn(2, 7, 12)
    args = (q, q, q, None, 3, False, False, None, False, True, None, "", 0, "attention_nowhere")
    heads = q.unflatten(-1, (3, 4)).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    out = torch.ops.slipstream.attention(*args)
    assert torch.allclose(out, want.transpose(1, 2).flatten(2), atol=1e-6)
    torch.library.opcheck(torch.ops.slipstream.attention.default, args)


def test_an_earlier_override_gets_the_call_s_own_options_in_a_graph_too():
    """Core's sparse attention skips its schedule if sigmas or block ids are missing."""
    seen = []

    def earlier(func, *args, **kwargs):
        options = kwargs["transformer_options"]
        seen.append((float(options["sigmas"][0]), options["block_type"], options["block_index"]))
        assert kwargs["_inside_attn_wrapper"]
        return func(*args, **kwargs)

    base = fake()
    base.model_options["transformer_options"]["optimized_attention_override"] = earlier
    refusing = FakeKernel("no", refuse="never")
    sample(patched(refusing, base), NOISE, steps=2)
    eager = seen[:]
    seen.clear()
    sample(compiled(patched(refusing, base)), NOISE, steps=2)
    assert seen == eager
    assert len(eager) == 8


def test_op_is_kept_out_of_cuda_graphs():
    """Inductor leaves an op with this tag outside of what it captures."""
    op.register()
    assert torch.Tag.cudagraph_unsafe in torch.ops.slipstream.attention.default.tags


def test_default_that_is_no_function_of_comfyui_is_its_pytorch_attention(monkeypatch):
    asked = []

    def function(name):
        asked.append(name)
        return None if name == "of_another_pack" else "attention_pytorch of ComfyUI"

    monkeypatch.setattr(op.host, "attention_function", function)
    assert op.default_function("of_another_pack") == "attention_pytorch of ComfyUI"
    assert asked == ["of_another_pack", "attention_pytorch"]
