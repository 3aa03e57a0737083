"""The order of a decision, branches that follow, keys that come and go, decisions from outside."""

from types import SimpleNamespace

import pytest
import torch
from slipstream.backends.cache.builtin import BuiltinEngine
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.cache.decisions import Decisions, branch_name
from slipstream.backends.cache.schedule import Schedule
from slipstream.backends.calls import BranchKey, ModelCall

SHAPE = ((1, 4, 8), torch.float32)
NUM_STEPS = 12


def make(*, shared=True, decider=None, reset_at_step=-1, schedule=None, **settings):
    run = SimpleNamespace(sigma=1.0)
    config = CacheConfig(residual_diff_threshold=0.5, **settings)
    return Decisions(
        run,
        schedule or Schedule(num_steps=NUM_STEPS, warmup=2),
        BuiltinEngine(config),
        shared=shared,
        reset_at_step=reset_at_step,
        decider=decider,
    )


def call_of(step, branch="cond", *, evaluation=None, occurrence=0, window=None):
    return ModelCall(
        index=0,
        step=step,
        evaluation=step if evaluation is None else evaluation,
        key=BranchKey((branch,), occurrence, window),
        cond_or_uncond=(0 if branch == "cond" else 1,),
    )


def do(decisions, call, value=1.0, signature=SHAPE):
    """One whole model call with a metric of `value`; (reused, reason, was it asked)."""
    decisions._run.sigma = 1.0 - call.evaluation / 100
    metric = torch.full((1, 4, 8), value)
    decision = decisions.begin(call, signature)
    asked = decision is None
    if decision is None:
        decision = decisions.ask(call, metric)
    if decisions.wants_metric(call):
        decisions.observe(call, decision.reuse, metric)
    if decision.reuse:
        assert decisions.predict(call)
    else:
        decisions.store(call, (torch.full((1, 4, 8), float(call.evaluation)),), signature)
    return decision.reuse, decision.reason, asked


def test_first_warmup_compare_cooldown():
    decisions = make()
    log = [do(decisions, call_of(step))[:2] for step in range(NUM_STEPS)]
    assert log[0] == (False, "first")
    assert log[1] == (False, "warmup")
    assert log[2:-1] == [(True, "below threshold")] * (NUM_STEPS - 3)
    assert log[-1] == (False, "cooldown")


def test_a_large_change_is_computed():
    decisions = make()
    for step in range(4):
        do(decisions, call_of(step))
    assert do(decisions, call_of(4), value=9.0)[:2] == (False, "above threshold")


def test_shared_branches_follow_the_first_one():
    decisions = make()
    for step in range(4):
        for branch in ("cond", "uncond"):
            log = do(decisions, call_of(step, branch))
    assert log == (True, "follows", False)
    do(decisions, call_of(4, "cond"), value=9.0)
    assert do(decisions, call_of(4, "uncond"), value=1.0) == (False, "follows", False)


def test_separate_branches_decide_for_themselves():
    decisions = make(shared=False)
    for step in range(4):
        do(decisions, call_of(step, "cond"))
        do(decisions, call_of(step, "uncond"), value=5.0)
    assert do(decisions, call_of(4, "cond"), value=9.0)[0] is False
    assert do(decisions, call_of(4, "uncond"), value=5.0) == (True, "below threshold", True)


def test_a_follower_without_a_residual_computes():
    decisions = make()
    for step in range(4):
        do(decisions, call_of(step, "cond"))
    assert do(decisions, call_of(4, "cond"))[0] is True
    assert do(decisions, call_of(4, "uncond"))[:2] == (False, "first")


@pytest.mark.parametrize(
    "other",
    [
        {"branch": "uncond"},
        {"occurrence": 1},
        {"window": (0, 1)},
    ],
    ids=str,
)
def test_every_part_of_the_key_has_its_own_residual(other):
    decisions = make(shared=False)
    for step in range(4):
        do(decisions, call_of(step))
    assert do(decisions, call_of(4, **other))[1] == "first"


def test_another_shape_computes():
    decisions = make()
    for step in range(4):
        do(decisions, call_of(step))
    other = ((1, 9, 8), torch.float32)
    assert do(decisions, call_of(4), signature=other)[:2] == (False, "first")


def test_keys_of_a_moving_window_are_forgotten():
    decisions = make(shared=False)
    held = []
    for step in range(10):
        do(decisions, call_of(step, window=(step, step + 1)))
        held.append(decisions.engine.nbytes())
    assert max(held) == held[-1] == 4 * held[0]


def test_peak_bytes_count_what_was_dropped_since():
    decisions = make(shared=False)
    for window in (None, (0, 1), (1, 2)):
        do(decisions, call_of(0, window=window))
    held = decisions.engine.nbytes()
    for step in range(1, 6):
        do(decisions, call_of(step))
    assert decisions.engine.nbytes() < held
    assert decisions.peak_bytes == held


def test_a_branch_that_paused_for_two_evaluations_is_still_known():
    decisions = make(shared=False)
    for step in range(4):
        do(decisions, call_of(step, "uncond"))
        do(decisions, call_of(step))
    for step in (4, 5):
        do(decisions, call_of(step))
    assert do(decisions, call_of(6, "uncond"))[0] is True


def test_two_evaluations_of_one_step_are_two():
    decisions = make(schedule=Schedule(num_steps=4, warmup=1))
    log = [
        do(decisions, call_of(step, evaluation=2 * step + half))[:2]
        for step in range(4)
        for half in (0, 1)
    ]
    assert [reuse for reuse, _ in log] == [False, False, True, True, True, True, False, False]


def test_static_mask_reuses_without_a_comparison():
    schedule = Schedule(num_steps=4, mask=(1, 0, 0, 1), static=True)
    decisions = make(schedule=schedule)
    assert not decisions.wants_metric(call_of(0))
    log = [do(decisions, call_of(step), value=float(step * 100)) for step in range(4)]
    assert [entry[0] for entry in log] == [False, True, True, False]
    assert not any(asked for _, _, asked in log)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_decider_overrules(wanted):
    seen = []

    def decider(call, reuse):
        seen.append((call.step, reuse))
        return wanted

    decisions = make(decider=decider)
    log = [do(decisions, call_of(step)) for step in range(6)]
    assert [step for step, _ in seen] == list(range(6)), "once per model call"
    assert log[0][0] is False, "nothing is stored in the first call, whatever anybody wants"
    assert [reuse for reuse, _, _ in log[1:]] == [wanted] * 5


def test_decider_gets_what_this_process_would_do():
    seen = []
    decisions = make(decider=lambda call, reuse: seen.append(reuse) or reuse)
    log = [do(decisions, call_of(step))[0] for step in range(NUM_STEPS)]
    assert seen == log
    assert any(log)


def test_extrapolation_stops_when_sigma_does_not_fall():
    decisions = make(calibrator="taylorseer")
    for step in range(5):
        do(decisions, call_of(step), value=9.0**step)
    assert decisions.is_monotone
    do(decisions, call_of(5), value=9.0**4)
    repeated = torch.full((1, 4, 8), 4.0)
    call = call_of(5)
    assert torch.equal(decisions.predict(call)[0], torch.full((1, 4, 8), 5.0)), "the line goes on"
    decisions._run.sigma = 1.0  # a restart sampler goes back up
    decisions.begin(call_of(6), SHAPE)
    assert not decisions.is_monotone
    assert torch.equal(decisions.predict(call_of(6))[0], repeated)


def test_extrapolation_stops_in_long_static_gaps():
    mask = (1, 1, 1, 1, 1) + (0,) * 6 + (1,)
    decisions = make(
        schedule=Schedule(num_steps=12, mask=mask, static=True), calibrator="taylorseer"
    )
    predicted = []
    for step in range(11):
        reuse = do(decisions, call_of(step))[0]
        if reuse:
            predicted.append(decisions.predict(call_of(step))[0].mean().item())
    assert predicted == [5.0, 6.0, 7.0, 4.0, 4.0, 4.0]


def test_reset_forgets_once():
    decisions = make(reset_at_step=5)
    log = [do(decisions, call_of(step))[:2] for step in range(8)]
    assert log[4][0] is True
    assert log[5] == (False, "first")
    assert log[6][0] is True


def test_limits_have_names():
    decisions = make(max_continuous_cached_steps=2)
    log = [do(decisions, call_of(step))[1] for step in range(8)]
    assert log[2:6] == ["below threshold", "below threshold", "max_continuous", "below threshold"]


def test_close_drops_everything():
    decisions = make()
    for step in range(4):
        do(decisions, call_of(step))
    held = decisions.engine.nbytes()
    decisions.close()
    assert decisions.engine.nbytes() == 0
    assert decisions.peak_bytes == held > 0  # nobody had asked before
    assert not decisions._held


def test_branch_names():
    assert branch_name(call_of(0)) == "cond"
    assert branch_name(call_of(0, "uncond", occurrence=1)) == "uncond, call 2"
    assert branch_name(call_of(0, window=tuple(range(4, 20)))) == "cond, frames 4-19"
