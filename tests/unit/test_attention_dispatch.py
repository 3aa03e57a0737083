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
    ("error", "sentence", "tries"),
    [
        (RuntimeError("bad stride"), "broken failed (RuntimeError: bad stride)", 2),
        (torch.cuda.OutOfMemoryError("full"), "broken ran out of memory", 4),
        (TypeError("unexpected keyword"), "broken failed (TypeError: unexpected keyword)", 2),
    ],
)
def test_failing_kernel_falls_back_in_the_same_call_and_is_named(error, sentence, tries):
    """Once for each of the two shapes (self and cross); out of memory is tried twice."""
    plain = sample(FakePatcher(), NOISE, steps=2)
    broken = FakeKernel("broken", raises=error)
    model = patched(broken)
    assert torch.equal(sample(model, NOISE, steps=2), plain)
    assert broken.num_runs == tries
    assert sentence in report(model)["reasons"]
    sample(model, NOISE, steps=2)
    assert broken.num_runs == 2 * tries  # a new run tries again


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


@pytest.mark.parametrize("autotune", [False, True])
def test_another_pack_on_top_of_ours_and_ours_again_meets_itself_once(autotune, monkeypatch):
    """Also while the default, which leads back to us, is timed."""
    from slipstream.backends.attention.plan import Planner

    depths, real = [0], Planner.plan

    def plan(*args, **kwargs):
        depths.append(depths[-1] + 1)
        try:
            assert depths[-1] == 1, "a call is planned while it is planned"
            return real(*args, **kwargs)
        finally:
            depths.pop()

    monkeypatch.setattr(Planner, "plan", plan)
    kernel = FakeKernel("one")
    inner = patched(kernel)
    ours = inner.model_options["transformer_options"]["optimized_attention_override"]
    wrapped = inner.clone()
    wrapped.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: ours(func, *args, **kwargs)
    )
    # Without a kernel nothing is timed, so with autotune one is there and is no faster.
    own = FakeKernel("two") if autotune else FakeKernel("no", refuse="never")
    model = patched(own, model=wrapped, autotune=autotune)
    sample(model, NOISE, steps=2)
    assert sum(report(model)["calls"].values()) == 8
    assert not any("while it was timed" in sentence for sentence in report(model)["reasons"])


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


# --- what a user with a GPU meets ---


def test_few_steps_use_approximate_kernels_by_default():
    for steps, calls in ((4, {"quick": 16}), (20, {"quick": 72, "sure": 8})):
        model = patched(
            FakeKernel("quick"), FakeKernel("sure", "exact"),
            dense_first_steps=-1, dense_last_steps=-1,
        )  # fmt: skip
        sample(model, NOISE, steps=steps)
        assert report(model)["calls"] == calls
    assert report(model)["schedule"] == "steps 0 and 19 exact by schedule"
    line = run_log(model).latest().sections["attention"].lines[0]
    assert line.endswith("; steps 0 and 19 exact by schedule")


def inexact(model, name="attention_sage"):
    """An override that answers with another function, as core's --use-sage-attention would."""

    def other(func, *args, **kwargs):
        return func(*args, **kwargs)

    other.__name__ = name
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    return model


def test_last_resort_for_calls_that_are_to_be_exact_is_no_plain_attention():
    """Manual and an approximate kernel over an inexact default: dense steps and short calls."""
    settings = {"policy": "manual", "backend": "quick", "dense_first_steps": 1}
    quick, fused = FakeKernel("quick"), FakeKernel("flash_sdpa", "exact")
    model = manual(quick, fused, model=inexact(FakePatcher()), **settings)
    sample(model, NOISE, steps=2)
    assert report(model)["calls"] == {"flash_sdpa": 4, "quick": 4}
    model = manual(quick, model=inexact(FakePatcher()), **settings)
    sample(model, NOISE, steps=2)
    assert report(model)["calls"] == {"pytorch": 4, "quick": 4}
    model = manual(quick, fused, **settings)  # an exact default stays
    sample(model, NOISE, steps=2)
    assert report(model)["calls"] == {"comfyui:sdpa": 4, "quick": 4}


def manual(*kernels, model=None, **settings):
    """As `patched`, with a kernel chosen by hand that the node's list does not have."""
    known, policies = fake_kernels.table(*kernels)
    config = AttentionConfig(**{**OPEN, **settings, "policy": "balanced", "backend": "auto"})
    object.__setattr__(config, "policy", "manual")
    object.__setattr__(config, "backend", settings["backend"])
    return apply_attention(model or FakePatcher(), config, kernels=known, policies=policies)


@pytest.mark.parametrize("where", ["the check", "timing", "second check"])
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), RuntimeError("odd")])
def test_failing_check_or_timing_ends_no_run(monkeypatch, where, error):
    from slipstream.backends.attention import plan, tuning

    plain = sample(FakePatcher(), NOISE, steps=4)
    real, seen = plan.probe, []

    def probe(*args, **kwargs):
        seen.append(0)
        if where == "the check" or (where == "second check" and len(seen) > 4):
            raise error
        return real(*args, **kwargs)

    def timed(call, num, device):
        raise error

    monkeypatch.setattr(plan, "probe", probe)
    if where == "timing":
        monkeypatch.setattr(tuning, "_timed", timed)
    model = patched(FakeKernel("quick"), autotune=where == "timing")
    out = sample(model, NOISE, steps=4)
    assert torch.allclose(out, plain, atol=1e-5)
    reasons = "; ".join(report(model)["reasons"])
    said = "ran out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else "odd"
    assert said in reasons
    assert run_log(model).latest().completed


def test_kernel_that_turns_nan_late_costs_one_repeated_step_and_no_picture():
    plain = sample(FakePatcher(), NOISE, steps=40)
    kernel = FakeKernel("late", bad=range(71, 10_000))
    model = patched(kernel)
    out = sample(model, NOISE, steps=40)
    assert torch.isfinite(out).all()
    assert torch.allclose(out, plain, atol=1e-4)
    record = run_log(model).latest()
    (note,) = [n for n in record.notes if "was computed again" in n]
    assert note.startswith("late gave NaN or infinite values in block double/0 at step 17")
    assert record.num_evaluations == 41
    assert record.to_json()["attention"]["calls"]["late"] > 0
    strict = patched(FakeKernel("late", bad=range(71, 10_000)), strict=True)
    with pytest.raises(AttentionError, match=r"block double/0 cannot use .*late gave NaN"):
        sample(strict, NOISE, steps=40)


def test_nan_of_the_model_itself_is_not_blamed_on_a_kernel():
    class Broken(FakeNet):
        def _forward(self, x, timestep, context, control, options):
            return super()._forward(x, timestep, context, control, options) * float("nan")

    kernel = FakeKernel("fine")
    model = patched(kernel, model=FakePatcher(FakeModel(Broken())), probe=False)
    sample(model, NOISE, steps=4)
    record = run_log(model).latest()
    assert any("they come from the model" in note for note in record.notes)
    assert record.num_evaluations == 5  # repeated once, not at every step
    assert set(report(model)["calls"]) == {"fine"}


def test_displaced_override_is_named_with_the_order_that_helps():
    def of_another_pack(func, *args, **kwargs):
        return func(*args, **kwargs)

    later = patched(FakeKernel("one")).clone()
    options = later.model_options["transformer_options"]
    options["optimized_attention_override"] = of_another_pack
    sample(later, NOISE, steps=2)
    (reason,) = [s for s in report(later)["reasons"] if "was put over" in s]
    assert "of_another_pack" in reason
    assert "put Slipstream Attention behind that node" in reason


def test_a_failing_shape_does_not_cost_the_other_shapes():
    class SelfOnly(FakeKernel):
        def run(self, q, k, v, **options):
            if q.shape[2] != k.shape[2]:
                self.num_runs += 1
                raise RuntimeError("no cross-attention")
            return super().run(q, k, v, **options)

    model = patched(SelfOnly("picky"))
    sample(model, NOISE, steps=4)
    assert report(model)["calls"] == {"picky": 8, "comfyui:sdpa": 8}


def test_label_says_exact_only_if_every_answer_was():
    refusing = FakeKernel("no", refuse="never")
    plain = patched(refusing)
    sample(plain, NOISE, steps=2)
    assert report(plain)["label"] == "exact"
    foreign = patched(refusing, model=inexact(FakePatcher()))
    sample(foreign, NOISE, steps=2)
    assert report(foreign)["label"] == "unknown"
    mixed = patched(FakeKernel("quick"), model=inexact(FakePatcher()))
    sample(mixed, NOISE, steps=2)
    assert report(mixed)["label"] == "approximate"


# --- what later runs take from earlier ones ---


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    from slipstream.backends import host

    monkeypatch.setattr(host, "user_folder", lambda: tmp_path)
    return tmp_path


def test_later_runs_check_one_layer(user_folder):
    kernel = FakeKernel("quick", error=0.01)
    checks = []
    for _ in range(3):
        model = patched(kernel)
        before = kernel.num_runs
        sample(model, NOISE, steps=4)
        assert report(model)["calls"] == {"quick": 16}
        assert all(layer["rel_l1"] == pytest.approx(0.01, rel=0.05)
                   for layer in report(model)["layers"])  # fmt: skip
        checks.append(kernel.num_runs - before)
    from slipstream.backends.attention import plan

    seen = []
    real = plan.probe
    plan.probe = lambda *a, **k: seen.append(0) or real(*a, **k)
    try:
        sample(patched(kernel), NOISE, steps=4)
        again = len(seen)
        sample(patched(kernel, retune=True), NOISE, steps=4)
        anew = len(seen) - again
    finally:
        plan.probe = real
    assert again == 4  # the worst layer of each of the two shapes, at first use and in mid-run
    assert anew == 8  # every layer


def test_refused_layers_are_remembered(user_folder):
    kernel = FakeKernel("wrong", error=0.3)
    sample(patched(kernel), NOISE, steps=4)
    assert kernel.num_runs == 4
    model = patched(kernel)
    sample(model, NOISE, steps=4)
    assert kernel.num_runs == 4
    assert any("accuracy check (rel-L1 above" in s for s in report(model)["reasons"])


def test_a_sample_that_no_longer_holds_makes_every_layer_prove_itself(user_folder):
    kernel = FakeKernel("quick", error=0.01)
    sample(patched(kernel), NOISE, steps=4)
    kernel.error = 0.3  # another driver, another build under the same version
    model = patched(kernel)
    plain = sample(FakePatcher(), NOISE, steps=4)
    out = sample(model, NOISE, steps=4)
    calls = report(model)["calls"]
    assert calls["comfyui:sdpa"] >= 12
    assert torch.allclose(out, plain, atol=0.2 * plain.abs().max())
    model = patched(kernel)
    sample(model, NOISE, steps=4)
    assert report(model)["calls"] == {"comfyui:sdpa": 16}


def test_timing_under_another_default_decides_nothing(user_folder, monkeypatch):
    """--use-sage-attention in one start, not in the next: the default's time is another one."""
    from slipstream.backends.attention import ranking, tuning

    def race(calls, request, views, timings, budget, interrupt):
        for name in calls:
            if timings.get(request, name) is None:
                timings.put(request, name, {"quick": 2.0}.get(name, 4.0 if "slow" in name else 1.0))
        return tuning.Race(ms={name: timings.get(request, name) for name in calls})

    def slow(func, *args, **kwargs):
        return func(*args, **kwargs)

    monkeypatch.setattr(ranking, "race", race)
    kernel = FakeKernel("quick")
    fast = patched(kernel, autotune=True)
    sample(fast, NOISE, steps=2)
    assert report(fast)["calls"] == {"comfyui:sdpa": 8}
    base = FakePatcher()
    base.model_options["transformer_options"]["optimized_attention_override"] = slow
    over = patched(kernel, autotune=True, model=base)
    sample(over, NOISE, steps=2)
    assert report(over)["calls"] == {"quick": 8}
    again = patched(kernel, autotune=True)
    sample(again, NOISE, steps=2)
    assert report(again)["calls"] == {"comfyui:sdpa": 8}


def test_approximate_kernels_need_ten_percent_exact_ones_three(user_folder):
    from slipstream.backends.attention.ranking import GAIN

    assert GAIN == {"exact": 0.97, "approximate": 0.90}
    model = patched(FakeKernel("quick"), autotune=True)
    sample(model, NOISE, steps=1)
    path = user_folder / "slipstream_attention_timings.json"
    content = json.loads(path.read_text())
    for percent, used in ((95, False), (85, True)):
        for shapes in content["timings"].values():
            for kernels in shapes.values():
                for name in kernels:
                    kernels[name] = percent / 100 if name == "quick" else 1.0
        path.write_text(json.dumps(content))
        model = patched(FakeKernel("quick"), autotune=True)
        sample(model, NOISE, steps=1)
        assert ("quick" in report(model)["calls"]) is used
        said = any("less than 10 % faster here" in s for s in report(model)["reasons"])
        assert said is not used


def test_without_room_the_exact_default_stays_and_the_report_says_so(monkeypatch):
    from slipstream.backends.attention import ranking

    monkeypatch.setattr(ranking, "_no_room", lambda views: "1.0 GiB free, 2.8 needed")
    model = patched(FakeKernel("quick"), FakeKernel("cudnn", "exact"), autotune=True)
    sample(model, NOISE, steps=2)
    assert report(model)["calls"] == {"comfyui:sdpa": 8}
    assert "cudnn is not timed: 1.0 GiB free, 2.8 needed" in report(model)["reasons"]


def test_frozen_plan_is_repeated_exactly(user_folder):
    one, two = FakeKernel("one", error=0.01), FakeKernel("two", error=0.02)
    first = patched(one, two, freeze="my plan")
    out = sample(first, NOISE, steps=4)
    assert set(report(first)["calls"]) == {"one"}
    # Later the other kernel would win: it stands first and has every reason to be chosen.
    second = patched(two, one, freeze="my plan")
    assert torch.equal(sample(second, NOISE, steps=4), out)
    assert set(report(second)["calls"]) == {"one"}
    third = patched(two, one, freeze=json.dumps(report(first)["plan"]))
    assert torch.equal(sample(third, NOISE, steps=4), out)
    anew = patched(two, one, freeze="my plan", retune=True)
    assert not torch.equal(sample(anew, NOISE, steps=4), out)
    assert set(report(anew)["calls"]) == {"two"}
    repeated = patched(one, two, freeze="my plan")
    sample(repeated, NOISE, steps=4)
    assert set(report(repeated)["calls"]) == {"two"}


def test_frozen_plan_without_its_kernel_says_so(user_folder):
    first = patched(FakeKernel("one"), freeze="my plan")
    sample(first, NOISE, steps=2)
    gone = FakeKernel("one", refuse="one is not here")
    model = patched(gone, freeze="my plan")
    sample(model, NOISE, steps=2)
    assert report(model)["calls"] == {"comfyui:sdpa": 8}
    assert "one is not here" in report(model)["reasons"]
    with pytest.raises(AttentionError, match="one is not here"):
        sample(patched(gone, freeze="my plan", strict=True), NOISE, steps=2)
