"""The attention technique on the stand-in patcher, with kernels that fail in every way."""

import json

import fake_kernels
import pytest
import torch
from fake_kernels import FakeKernel
from fake_patcher import FakeModel, FakeNet, FakePatcher, sample
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig, AttentionError
from slipstream.backends.run import run_log

NOISE = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
OPEN = {"min_tokens": 0, "dense_first_steps": 0, "dense_last_steps": 0, "autotune": False}


def patched(*kernels, model=None, **settings):
    known, policies = fake_kernels.table(*kernels)
    config = AttentionConfig(**{**OPEN, **settings})
    return apply_attention(model or FakePatcher(), config, kernels=known, policies=policies)


def report(model):
    return run_log(model).latest().to_json()["attention"]


def test_kernel_answers_every_call_and_the_plain_model_is_untouched():
    base = FakePatcher()
    plain = sample(base, NOISE, steps=4)
    kernel = FakeKernel("one")
    model = patched(kernel, model=base)
    out = sample(model, NOISE, steps=4)
    assert torch.allclose(out, plain, atol=1e-5)
    assert report(model)["calls"] == {"one": 16}
    assert torch.equal(sample(base, NOISE, steps=4), plain)
    assert base.model_options == {"transformer_options": {}}
    assert not any(base.wrappers.values())
    assert not base.attachments
    assert all("forward" not in m.__dict__ for m in base.model.modules())


def test_second_run_of_the_same_model_reports_its_own_numbers():
    model = patched(FakeKernel("one"))
    sample(model, NOISE, steps=4)
    first = report(model)
    sample(model, NOISE, steps=4)
    assert report(model)["calls"] == first["calls"]
    assert [r.num_steps for r in run_log(model).records] == [4, 4]


def test_wrong_kernel_is_probed_out_and_the_call_is_exact():
    plain = sample(FakePatcher(), NOISE, steps=4)
    wrong = FakeKernel("wrong", error=0.3)
    model = patched(wrong)
    assert torch.allclose(sample(model, NOISE, steps=4), plain, atol=1e-6)
    section = report(model)
    assert "wrong" not in section["calls"]
    assert any("accuracy check (rel-L1 above 0.05)" in s for s in section["reasons"])
    assert section["layers"][0]["rel_l1"] == pytest.approx(0.3, rel=1e-2)
    assert wrong.num_runs == 4  # once per layer and call, then never again
    trusted = patched(FakeKernel("wrong", error=0.3), probe=False)
    assert not torch.allclose(sample(trusted, NOISE, steps=4), plain, atol=1e-3)


def test_broken_exact_kernel_is_caught_too():
    """An exact kernel of a mismatched build is a black picture, unless somebody looks."""
    plain = sample(FakePatcher(), NOISE, steps=3)
    broken = FakeKernel("cudnn", "exact", bad=range(1000))
    model = patched(broken, policy="exact")
    assert torch.equal(sample(model, NOISE, steps=3), plain)
    assert any("cudnn failed the accuracy check (NaN" in s for s in report(model)["reasons"])


def test_kernel_that_goes_bad_in_mid_run_is_caught_by_the_second_probe():
    plain = sample(FakePatcher(), NOISE, steps=4)
    kernel = FakeKernel("late", bad=(8,))  # the first layer's call at step 2 of 4
    model = patched(kernel)
    out = sample(model, NOISE, steps=4)
    assert torch.allclose(out, plain, atol=1e-5)
    assert any("NaN" in s for s in report(model)["reasons"])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("bad stride"), "broken failed (RuntimeError: bad stride)"),
        (torch.cuda.OutOfMemoryError("full"), "broken ran out of memory"),
        (TypeError("unexpected keyword"), "broken failed (TypeError: unexpected keyword)"),
    ],
)
def test_failing_kernel_falls_back_in_the_same_call_and_is_named(error, sentence):
    plain = sample(FakePatcher(), NOISE, steps=2)
    broken = FakeKernel("broken", raises=error)
    model = patched(broken)
    assert torch.equal(sample(model, NOISE, steps=2), plain)
    assert broken.num_runs == 1
    assert sentence in report(model)["reasons"]
    sample(model, NOISE, steps=2)
    assert broken.num_runs == 2  # a new run tries again


def test_dead_cuda_context_is_raised():
    model = patched(FakeKernel("dead", raises=RuntimeError("an illegal memory access was met")))
    with pytest.raises(RuntimeError, match="illegal memory"):
        sample(model, NOISE, steps=2)
    assert run_log(model).latest().completed is False


def test_schedule_keeps_first_and_last_steps_and_listed_blocks_exact():
    kernel, exact = FakeKernel("quick"), FakeKernel("sure", "exact")
    model = patched(kernel, exact, dense_first_steps=1, dense_last_steps=1, dense_blocks="1")
    sample(model, NOISE, steps=5)
    section = report(model)
    assert section["calls"] == {"sure": 5 * 4 - 3 * 2, "quick": 3 * 2}
    assert {layer["block"]: set(layer["kernels"]) for layer in section["layers"]} == {
        "double/0": {"sure", "quick"},
        "double/0.1": {"sure", "quick"},
        "double/1": {"sure"},
        "double/1.1": {"sure"},
    }


def test_min_tokens_keeps_short_calls_exact():
    kernel = FakeKernel("quick")
    model = patched(kernel, min_tokens=65)
    sample(model, NOISE, steps=2)
    assert kernel.num_runs == 0
    assert "Calls under min_tokens (65) stay exact" in report(model)["reasons"]


def test_ineligible_kernel_leaves_the_reason_and_strict_raises_it():
    refusing = FakeKernel("sage1", refuse="mask: sage1 takes none")
    model = patched(refusing)
    sample(model, NOISE, steps=2)
    assert refusing.num_runs == 0
    strict = patched(refusing, strict=True)
    with pytest.raises(AttentionError, match=r"Strict is on and block double/0 cannot use"):
        sample(strict, NOISE, steps=2)


def test_on_a_cpu_the_real_table_changes_nothing_and_says_so():
    base = FakePatcher()
    plain = sample(base, NOISE, steps=3)
    for policy in ("exact", "balanced", "fastest"):
        model = apply_attention(base, AttentionConfig(policy=policy, min_tokens=0))
        assert torch.equal(sample(model, NOISE, steps=3), plain)
        reasons = report(model)["reasons"]
        assert any("need a CUDA or ROCm GPU" in sentence for sentence in reasons)
    strict = apply_attention(base, AttentionConfig(policy="exact", strict=True))
    with pytest.raises(AttentionError, match="CUDA"):
        sample(strict, NOISE, steps=3)


def test_manual_math_runs_on_a_cpu():
    base = FakePatcher()
    plain = sample(base, NOISE, steps=3)
    model = apply_attention(base, AttentionConfig(policy="manual", backend="math"))
    assert torch.allclose(sample(model, NOISE, steps=3), plain, rtol=1e-5, atol=1e-6)
    assert report(model)["calls"] == {"math": 12}


def test_chain_keeps_an_earlier_override_and_replaces_our_own():
    seen = []

    def other(func, *args, **kwargs):
        seen.append(kwargs["_inside_attn_wrapper"])
        return func(*args, **kwargs)

    base = FakePatcher()
    base.model_options["transformer_options"]["optimized_attention_override"] = other
    refusing = FakeKernel("no", refuse="never")
    once = patched(refusing, model=base)
    twice = patched(refusing, model=once)
    sample(twice, NOISE, steps=2)
    assert len(seen) == 8
    assert all(seen)
    override = twice.model_options["transformer_options"]["optimized_attention_override"]
    assert override.previous is other
    assert any("test_attention_dispatch" in s for s in report(twice)["reasons"])


def test_another_pack_on_top_of_ours_and_ours_again_meets_itself_once():
    kernel = FakeKernel("one")
    inner = patched(kernel)
    ours = inner.model_options["transformer_options"]["optimized_attention_override"]
    wrapped = inner.clone()
    wrapped.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: ours(func, *args, **kwargs)
    )
    refusing = FakeKernel("no", refuse="never")
    model = patched(refusing, model=wrapped)
    sample(model, NOISE, steps=2)
    assert sum(report(model)["calls"].values()) == 8


def test_model_without_the_hook_is_named():
    class Silent(FakeNet):
        def _forward(self, x, timestep, context, control, options):
            return super()._forward(x, timestep, context, control, {})

    model = patched(FakeKernel("one"), model=FakePatcher(FakeModel(Silent())))
    sample(model, NOISE, steps=2)
    section = report(model)
    assert section["calls"] == {}
    assert any("does not pass through ComfyUI's hook" in s for s in section["reasons"])


def test_nothing_stays_after_a_run_and_after_an_exception():
    kernel = FakeKernel("one")
    model = patched(kernel)
    sample(model, NOISE, steps=2)
    options = model.model_options["transformer_options"]
    assert "slipstream.run" not in options
    assert "slipstream.attention.call" not in options
    from slipstream.backends.attention import op

    assert op._bound == {}

    def boom(executor, *args, **kwargs):
        raise InterruptedError

    failing = model.clone()
    failing.add_wrapper_with_key("diffusion_model", "boom", boom)
    with pytest.raises(InterruptedError):
        sample(failing, NOISE, steps=2)
    assert op._bound == {}


def test_kill_switch(monkeypatch):
    kernel = FakeKernel("one")
    model = patched(kernel)
    monkeypatch.setenv("SLIPSTREAM_DISABLE", "cache, attention")
    sample(model, NOISE, steps=2)
    assert kernel.num_runs == 0
    record = run_log(model).latest().to_json()
    assert "attention" not in record
    assert any("SLIPSTREAM_DISABLE" in note for note in record["run"]["notes"])


def test_autotune_uses_a_kernel_only_if_it_is_faster():
    class Slow(FakeKernel):
        def run(self, *args, **kwargs):
            import time

            time.sleep(0.003)
            return super().run(*args, **kwargs)

    model = patched(Slow("slow"), autotune=True)
    sample(model, NOISE, steps=2)
    section = report(model)
    assert "slow" not in section["calls"]
    assert any("slow is not faster here" in s for s in section["reasons"])
    assert section["speedup_vs_exact"] == 1.0


def test_report_is_json():
    model = patched(FakeKernel("one"))
    sample(model, NOISE, steps=2)
    record = run_log(model).latest()
    assert json.loads(json.dumps(record.to_json())) == record.to_json()
    (grid,) = record.sections["attention"].figures
    assert grid.row_labels == ("double/0", "double/0.1", "double/1", "double/1.1")
    assert grid.cells == (("one", "one"),) * 4
