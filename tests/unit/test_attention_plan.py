"""Decisions of the planner that only a GPU meets, on requests that say so."""

from dataclasses import replace

import fake_kernels
import pytest
import torch
from fake_kernels import FakeKernel
from slipstream.backends.attention import plan as plan_module
from slipstream.backends.attention import ranking
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.attention.entry import Fallback
from slipstream.backends.attention.kept import Kept
from slipstream.backends.attention.kernels.comfyui import ComfyUIPytorch
from slipstream.backends.attention.layout import Views, request_of
from slipstream.backends.attention.plan import Planner
from slipstream.backends.attention.policy import order
from slipstream.backends.attention.request import BlockKey
from slipstream.backends.attention.timings import Timings
from slipstream.backends.attention.verdicts import Verdicts
from torch.nn import functional

BLOCK = BlockKey("double", 0, 0)


def sdpa(views):
    return functional.scaled_dot_product_attention(
        views.q, views.k, views.v, attn_mask=views.mask, scale=views.scale
    )


def views(tokens=40, mask=None):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=gen) for _ in range(3))
    return Views(q, k, v, mask, None)


class Setting:
    """A planner over fake kernels, and calls to it."""

    def __init__(self, *kernels, folder=None, may_stay=True, **settings):
        known, policies = fake_kernels.table(*kernels)
        config = AttentionConfig(**{"min_tokens": 0, "autotune": False, **settings})
        self.kept = Kept(Timings(folder, {}), Verdicts(folder, "model", {}))
        approximate, exact = order(config, known, policies)
        self.planner = Planner(config, approximate, exact, ComfyUIPytorch(), self.kept)
        self.fallback = Fallback(sdpa, "default:attention_pytorch", may_stay)

    def plan(self, call, block=BLOCK, **facts):
        request = replace(request_of(call), **facts)
        return self.planner.plan(
            block, request, call, self.fallback, dense_step=False, dense_block=False
        )


def test_nothing_is_checked_or_timed_while_a_graph_is_captured(monkeypatch):
    """Reading a number back, and timing, end a capture with an error."""
    kernel, exact = FakeKernel("quick"), FakeKernel("cudnn", "exact")
    setting = Setting(kernel, exact, autotune=True)

    def forbidden(*args, **kwargs):
        raise AssertionError("no sync while capturing")

    monkeypatch.setattr(plan_module, "probe", forbidden)
    monkeypatch.setattr(ranking, "race", forbidden)
    entry, out = setting.plan(views(), capturing=True)
    assert (entry.kernel, out) == (None, None)
    assert kernel.num_runs == exact.num_runs == 0
    assert "cudnn is not timed: while a CUDA graph is captured" in entry.reasons.values()


def test_a_kernel_with_a_known_verdict_may_serve_a_capture(monkeypatch, tmp_path):
    kernel = FakeKernel("quick", error=0.01)
    others = [BlockKey("double", i, 0) for i in (1, 2)]
    first = Setting(kernel, folder=tmp_path)
    for block in others:
        first.plan(views(), block)
    first.kept.save({}, is_complete=True)
    again = Setting(kernel, folder=tmp_path)
    monkeypatch.setattr(plan_module, "probe", None)  # calling it would raise
    for block in others:
        entry, out = again.plan(views(), block, capturing=True)
        assert entry.kernel is kernel
        assert out is not None
    entry, out = again.plan(views(), BlockKey("double", 9, 0), capturing=True)
    assert out is None
    assert "quick is not used while a CUDA graph is captured" in entry.reasons["quick"]


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 40, 40)])
def test_efficient_is_timed_only_with_a_mask(mask):
    flash = FakeKernel("flash_sdpa", "exact", refuse=None if mask is None else "mask")
    kernels = flash, FakeKernel("efficient", "exact")
    setting = Setting(*kernels, policy="exact", autotune=True)
    setting.plan(views(mask=mask))
    assert (kernels[1].num_runs > 0) is (mask is not None)


def test_room_is_asked_as_comfyui_counts_and_for_the_timed_heads_only(monkeypatch):
    asked = []

    class OnCuda:
        device = torch.device("cuda", 1)

        def __init__(self, heads):
            self.shape, self.nbytes = (1, heads, 65_536, 128), heads * 65_536 * 256

        def __getitem__(self, index):
            return OnCuda(index[1].stop)

    monkeypatch.setattr(ranking.host, "free_memory", lambda device: asked.append(device) or 2**30)
    whole = Views(OnCuda(40), OnCuda(40), OnCuda(40), None, None)
    assert ranking._no_room(whole) is None  # one head: 150 MB of 6 GB
    monkeypatch.setattr(ranking.host, "free_memory", lambda device: 2**26)
    assert ranking._no_room(whole) == "0.1 GiB free, 0.1 needed"
    assert asked == [torch.device("cuda", 1)]


def test_tuning_is_shown_once_it_measures(monkeypatch):
    shown = []
    monkeypatch.setattr(ranking.host, "show_text_on_running_node", shown.append)
    setting = Setting(FakeKernel("quick"), autotune=True)
    setting.plan(views())
    setting.plan(views(), BlockKey("double", 1, 0))
    assert shown[0] == ranking.TUNING
    assert "kernels timed in" in shown[1]
    assert len(shown) == 2


def test_cancel_while_timing_ends_the_run(monkeypatch):
    class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
        pass

    def cancelled():
        raise InterruptProcessingException

    monkeypatch.setattr(ranking.host, "raise_if_cancelled", cancelled)
    with pytest.raises(InterruptProcessingException):
        Setting(FakeKernel("quick"), autotune=True).plan(views())


def test_policy_exact_over_an_inexact_default_falls_to_comfyui_s_own_exact_attention():
    refused = FakeKernel("cudnn", "exact", refuse="head_dim")
    entry, out = Setting(refused, policy="exact", may_stay=False).plan(views())
    assert entry.kernel.id == "pytorch"
    assert torch.allclose(out, sdpa(views()), atol=1e-6)


def test_out_of_memory_is_tried_once_more_and_says_nothing_about_other_shapes():
    class Full(FakeKernel):
        def run(self, *args, **kwargs):
            if self.num_runs == 0:
                self.num_runs += 1
                raise torch.cuda.OutOfMemoryError("full")
            return super().run(*args, **kwargs)

    kernel = Full("quick")
    entry, out = Setting(kernel).plan(views())
    assert entry.kernel is kernel
    assert out is not None
    always = FakeKernel("always", raises=torch.cuda.OutOfMemoryError("full"))
    setting = Setting(always)
    for tokens in (40, 80, 160, 320):
        entry, _ = setting.plan(views(tokens))
        assert entry.reasons["always"] == "always ran out of memory"
    assert always.num_runs == 8


def test_three_failing_shapes_are_enough():
    broken = FakeKernel("broken", raises=RuntimeError("no"))
    setting = Setting(broken)
    for tokens in (40, 80, 160, 320, 640):
        setting.plan(views(tokens))
    assert broken.num_runs == 3
