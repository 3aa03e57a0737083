"""Built-in engine and cache-dit over the same residuals: every decision and prediction alike."""

import itertools

import pytest
import torch
from slipstream.backends.cache import cachedit
from slipstream.backends.cache.builtin import BuiltinEngine
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.cache.interval import IntervalEngine
from slipstream.backends.cache.taylor import TaylorSeries

needs_cache_dit = pytest.mark.skipif(
    cachedit.unavailable() is not None, reason="cache-dit is not installed"
)
KEY = "cond"


def recorded(seed, num=40, dtype=torch.float32):
    """A metric and a two-stream residual per evaluation, drifting at an uneven pace."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(1, 6, 8, generator=generator)
    streams = [torch.randn(1, 6, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)]
    for i in range(num):
        pace = 0.25 * float(torch.rand((), generator=generator)) + (0.6 if i % 11 == 10 else 0)
        metric = metric + pace * torch.randn(metric.shape, generator=generator)
        streams = [s + 0.1 * torch.randn(s.shape, generator=generator) for s in streams]
        yield metric.to(dtype), tuple(s.to(dtype) for s in streams)


def drive(engine, recording, *, num_streams=2, warmup=4, gap_at=()):
    """What each evaluation did: (asked, reuse, diff, prediction)."""
    log = []
    for evaluation, (metric, residual) in enumerate(recording):
        if evaluation in gap_at:  # this branch was not called in that evaluation
            continue
        engine.begin(KEY, evaluation)
        answer = None
        if evaluation >= warmup:
            answer = engine.ask(KEY, metric)
        reuse = answer is not None and answer.reuse
        engine.settle(KEY, reuse)
        engine.observe(KEY, reuse, metric)
        if reuse:
            predicted = engine.predict(KEY, True)
            assert len(engine.predict(KEY, False)) == num_streams
            log.append((True, answer.diff, predicted))
        else:
            engine.store(KEY, residual[:num_streams])
            log.append((False, None if answer is None else answer.diff, None))
    engine.close()
    return log


LIMITS = [
    {},
    {"max_continuous_cached_steps": 2},
    {"max_cached_steps": 5},
    {"max_accumulated_residual_diff": 1.5},
    {"max_cached_steps": 9, "max_continuous_cached_steps": 3, "max_accumulated_residual_diff": 3.0},
    {"residual_diff_threshold": 0.0},
    {"residual_diff_threshold": 1.0},
    {"max_cached_steps": 0},
]


@needs_cache_dit
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_engines_agree_on_every_decision_and_prediction(limits, order):
    reused = 0
    for seed, num_streams in itertools.product(range(4), (1, 2)):
        config = CacheConfig(
            **{
                "residual_diff_threshold": 0.2,
                "calibrator": "taylorseer" if order else "none",
                "calibrator_order": max(order, 1),
                **limits,
            }
        )
        logs = [
            drive(engine, list(recorded(seed)), num_streams=num_streams)
            for engine in (BuiltinEngine(config), cachedit.CacheDitEngine(config))
        ]
        assert len(logs[0]) == 40
        for (ours, diff, predicted), (theirs, their_diff, their_predicted) in zip(
            *logs, strict=True
        ):
            assert ours == theirs
            assert diff == their_diff
            if ours:
                assert all(map(torch.equal, predicted, their_predicted))
        reused += sum(row[0] for row in logs[0])
    never = limits in ({"residual_diff_threshold": 0.0}, {"max_cached_steps": 0})
    assert (reused == 0) == never


@needs_cache_dit
def test_engines_agree_in_bfloat16_and_when_a_branch_is_absent_for_a_while():
    config = CacheConfig(residual_diff_threshold=0.3, max_continuous_cached_steps=2)
    recording = list(recorded(7, dtype=torch.bfloat16))
    logs = [
        drive(engine, recording, gap_at=(9, 10, 17))
        for engine in (BuiltinEngine(config), cachedit.CacheDitEngine(config))
    ]
    assert [row[:2] for row in logs[0]] == [row[:2] for row in logs[1]]
    assert any(row[0] for row in logs[0])


@needs_cache_dit
def test_parity_test_would_notice_another_threshold():
    """Negative control."""
    recording = list(recorded(3))
    ours = drive(BuiltinEngine(CacheConfig(residual_diff_threshold=0.18)), recording)
    theirs = drive(cachedit.CacheDitEngine(CacheConfig(residual_diff_threshold=0.2)), recording)
    assert [row[:2] for row in ours] != [row[:2] for row in theirs]


@needs_cache_dit
@pytest.mark.parametrize("calibrator", ["none", "taylorseer", "foca", "dmd"])
def test_cache_dit_predicts_with_every_calibrator_and_holds_nothing_afterwards(calibrator):
    if calibrator == "dmd" and cachedit.unavailable("dmd"):
        pytest.skip(cachedit.unavailable("dmd"))
    config = CacheConfig(residual_diff_threshold=0.5, calibrator=calibrator)
    engine = cachedit.CacheDitEngine(config)
    close, held = engine.close, []
    engine.close = lambda: (held.append(engine.nbytes()), close())
    log = drive(engine, list(recorded(1)))
    assert any(row[0] for row in log)
    finite = [p for row in log if row[0] for p in row[2]]
    assert all(torch.isfinite(p).all() for p in finite)
    states = {"none": 1, "taylorseer": 2, "foca": 3, "dmd": 6}[calibrator]
    residual_bytes = (6 + 3) * 8 * 4
    assert held[0] >= states * residual_bytes
    assert engine.nbytes() == 0
    assert engine._manager.current_context is None


@needs_cache_dit
def test_keys_have_contexts_of_their_own():
    engine = cachedit.CacheDitEngine(CacheConfig(residual_diff_threshold=0.9))
    a, b = torch.ones(1, 2, 4), torch.full((1, 2, 4), 100.0)
    for key, value in (("a", a), ("b", b)):
        engine.begin(key, 0)
        engine.settle(key, False)
        engine.observe(key, False, value)
        engine.store(key, (value,))
    engine.begin("a", 1)
    assert engine.ask("a", a * 1.01).reuse
    engine.begin("b", 1)
    assert not engine.ask("b", a).reuse
    assert torch.equal(engine.predict("a", True)[0], a)
    engine.drop("a")
    assert engine.nbytes() == b.numel() * 4  # metric and residual are one tensor here
    engine.close()


def test_missing_cache_dit_is_a_sentence_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(cachedit, "installed_version", lambda: None)
    assert cachedit.unavailable() == (
        "cache-dit is not installed: pip install cache-dit diffusers, or set engine to builtin."
    )


def test_dmd_of_an_old_cache_dit_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cachedit, "installed_version", lambda: "1.3.12")
    monkeypatch.setattr(cachedit.importlib.util, "find_spec", lambda name: object())
    assert cachedit.unavailable("dmd") == "dmd needs cache-dit 1.5 or newer, found 1.3.12."


@pytest.mark.parametrize("error", [ImportError("no diffusers"), TypeError("no diffusers")])
def test_broken_cache_dit_is_a_sentence(monkeypatch, error):
    def broken():
        raise error

    monkeypatch.setattr(cachedit, "installed_version", lambda: "1.5.3")
    monkeypatch.setattr(cachedit.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cachedit, "_import_cache_dit", broken)
    assert cachedit.unavailable().startswith("cache-dit 1.5.3 cannot be imported (no diffusers)")


def test_taylor_series_is_exact_on_a_line():
    series = TaylorSeries(1)
    for i in range(6):
        series.begin()
        series.update(torch.tensor([2.0 * i + 1.0]))
    for _ in range(3):
        series.begin()
    assert torch.equal(series.predict(), torch.tensor([2.0 * 8 + 1.0]))
    assert torch.equal(series.latest, torch.tensor([11.0]))


def test_interval_engine_computes_every_nth():
    engine = IntervalEngine(3)
    log = []
    for evaluation in range(9):
        engine.begin(KEY, evaluation)
        reuse = evaluation > 0 and engine.ask(KEY, None).reuse
        engine.settle(KEY, reuse)
        if not reuse:
            engine.store(KEY, (torch.zeros(1),))
        log.append(int(reuse))
    assert log == [0, 1, 1] * 3


@needs_cache_dit
def test_cache_dit_holds_no_more_for_taylorseer_than_the_built_in_engine():
    held = []
    config = CacheConfig(residual_diff_threshold=0.5, calibrator="taylorseer")
    for engine in (BuiltinEngine(config), cachedit.CacheDitEngine(config)):
        for evaluation, (metric, residual) in enumerate(recorded(1, num=8)):
            engine.begin(KEY, evaluation)
            engine.settle(KEY, False)
            engine.observe(KEY, False, metric)
            engine.store(KEY, residual)
        held.append(engine.nbytes())
        engine.close()
    assert held[0] == held[1] == (48 + 2 * (48 + 24)) * 4
