"""Timing candidates: on some heads, in turn, within a budget, never at the cost of the run."""

import pytest
import torch
from slipstream.backends.attention import tuning
from slipstream.backends.attention.layout import Views, request_of
from slipstream.backends.attention.timings import Timings
from slipstream.backends.attention.tuning import Budget, race, slice_heads


def views(heads=24, tokens=256, kv_heads=None, mask=None, batch=1):
    kv_heads = kv_heads or heads
    q = torch.zeros(batch, heads, tokens, 8)
    k, v = (torch.zeros(batch, kv_heads, tokens, 8) for _ in range(2))
    return Views(q, k, v, mask, None)


class Clock:
    """time.perf_counter that only moves when somebody works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)

    def working(self, seconds, seen=None):
        def call(part):
            self.now += seconds
            if seen is not None:
                seen.append(part.q.shape)

        return call


def nothing():
    pass


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "timed", "factor"),
    [
        (1, 40, 40, 32_760, 2, 20.0),  # Wan 480p: two heads fill a GPU
        (1, 24, 24, 4_608, 15, 24 / 15),  # Flux 1024
        (1, 10, 10, 1_024, 10, 1.0),  # SDXL: all of it
        (1, 32, 8, 16_384, 4, 8.0),  # grouped queries: whole groups
        (2, 24, 24, 32_760, 1, 24.0),
    ],
)
def test_as_many_heads_as_fill_a_gpu(batch, heads, kv_heads, tokens, timed, factor):
    q = torch.empty(batch, heads, tokens, 1, device="meta")
    k = torch.empty(batch, kv_heads, tokens, 1, device="meta")
    mask = torch.empty(batch, heads, 1, tokens, device="meta")
    part, times = slice_heads(Views(q, k, k, mask, None))
    assert part.q.shape[1] == timed
    assert part.k.shape[1] * (heads // kv_heads) == timed
    assert part.mask.shape[1] == timed
    assert times == pytest.approx(factor)
    shared = torch.empty(1, 1, 1, tokens, device="meta")
    assert slice_heads(Views(q, k, k, shared, None))[0].mask is shared


def test_times_are_of_the_whole_call_and_remembered(tmp_path, monkeypatch):
    clock, seen = Clock(monkeypatch), []
    call = views(heads=40, tokens=32_768)
    request, timings = request_of(call), Timings(tmp_path, {})
    calls = {"a": clock.working(0.01, seen), "b": clock.working(0.02)}
    found = race(calls, request, call, timings, Budget(), nothing)
    assert found.ms == {"a": pytest.approx(200.0), "b": pytest.approx(400.0)}
    assert {shape[1] for shape in seen} == {2}
    again = race(calls, request, call, timings, Budget(), nothing)
    assert again.ms == {"a": pytest.approx(200.0), "b": pytest.approx(400.0)}
    assert len(seen) == 4  # warm-up, then three samples; nothing the second time


def test_long_calls_are_timed_once(tmp_path, monkeypatch):
    clock, seen = Clock(monkeypatch), []
    budget = Budget(least_s=100.0)
    call = views()
    race({"slow": clock.working(0.5, seen)}, request_of(call), call, Timings(None, {}), budget,
         nothing)  # fmt: skip
    assert len(seen) == 2
    assert budget.spent_s == pytest.approx(1.0)


def test_budget_leaves_the_rest_for_the_next_run(monkeypatch):
    clock = Clock(monkeypatch)
    call, timings = views(), Timings(None, {})
    budget = Budget()
    calls = {"default": clock.working(0.6), "one": clock.working(0.9), "two": clock.working(0.1)}
    found = race(calls, request_of(call), call, timings, budget, nothing)
    assert found.open == ["two"]
    assert set(found.ms) == {"default", "one"}
    assert budget.left_s < 0
    budget = Budget()
    found = race(calls, request_of(call), call, timings, budget, nothing)
    assert found.open == []
    assert set(found.ms) == {"default", "one", "two"}
    assert Budget(expected_s=600.0).left_s == pytest.approx(12.0)  # 2 % of a long run


def test_a_candidate_that_raises_is_dropped_at_any_time(monkeypatch):
    clock = Clock(monkeypatch)
    num = 0

    def later(part):
        nonlocal num
        num += 1
        if num > 2:
            raise torch.cuda.OutOfMemoryError("full")

    def at_once(part):
        raise RuntimeError("no")

    call = views()
    calls = {"default": clock.working(0.01), "later": later, "at once": at_once}
    found = race(calls, request_of(call), call, Timings(None, {}), Budget(), nothing)
    assert set(found.ms) == {"default"}
    assert set(found.dropped) == {"later", "at once"}


def test_dead_context_and_cancel_are_raised(monkeypatch):
    class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
        pass

    call = views()

    def dead(part):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        race({"dead": dead}, request_of(call), call, Timings(None, {}), Budget(), nothing)

    asked = []

    def cancelled():
        asked.append(0)
        if len(asked) == 2:
            raise InterruptProcessingException

    clock = Clock(monkeypatch)
    calls = {"a": clock.working(0.01), "b": clock.working(0.01)}
    with pytest.raises(InterruptProcessingException):
        race(calls, request_of(call), call, Timings(None, {}), Budget(), cancelled)
    assert len(asked) == 2
