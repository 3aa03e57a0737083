"""The tuner on recorded steps: when it measures, plans, changes, judges and goes back."""

from types import SimpleNamespace

import pytest
from offload_runs import make, run, seconds_of
from slipstream.backends.offload import host
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.offload.plan import all_resident
from slipstream.backends.offload.trial import Decision, Setting
from slipstream.backends.offload.tuner import MEASURED_STEP

AUTO, SPEED = OffloadConfig(mode="auto"), OffloadConfig(mode="speed")
MEMORY = OffloadConfig(mode="memory")
STAGED = Setting(prefetches=True)


def gaining(share):
    """Model calls of 1 s, shorter by `share` with prefetch, but not the first of a setting."""
    return seconds_of(plain=1.0, staged=1.0 - share, first=1.5)


def test_one_step_is_measured_where_nothing_is_tried(monkeypatch):
    one = make(monkeypatch, AUTO, gain=0.0)
    assert run(one, 6) == {}
    assert one.measured_steps == [MEASURED_STEP]
    assert one.proposal is not None
    assert one.decision() is None
    assert one.verdict is None


def test_auto_keeps_a_prefetch_that_gains(monkeypatch):
    one = make(monkeypatch, AUTO, gain=0.2)
    assert run(one, 8, gaining(0.2)) == {2: STAGED}
    assert one.measured_steps == [1, 2, 3]  # the first under a setting is not judged
    assert one.verdict == "kept"
    assert one.gain == pytest.approx(0.2)
    found = one.decision()
    assert found.setting == STAGED
    later = make(monkeypatch, AUTO, gain=0.2)
    later.follow(found)
    assert later.setting == STAGED  # from the first step on
    assert run(later, 8, gaining(0.2)) == {}
    assert later.verdict == "kept before"
    assert later.decision() == found


@pytest.mark.parametrize("gain", [-0.5, 0.0, 0.029])
def test_auto_undoes_what_gains_nothing_within_three_steps_and_remembers(monkeypatch, gain):
    one = make(monkeypatch, AUTO, gain=0.2)
    changes = run(one, 8, gaining(gain))
    assert changes == {2: STAGED, 4: Setting()}
    assert max(changes) - min(changes) <= 3
    assert one.verdict == "undone"
    found = one.decision()
    assert found.setting == Setting()
    later = make(monkeypatch, AUTO, gain=0.2)
    later.follow(found)
    assert run(later, 8, gaining(gain)) == {}
    assert later.verdict == "undone before"
    assert later.decision() == found


def test_auto_tries_only_what_promises_three_percent(monkeypatch):
    assert run(make(monkeypatch, AUTO, gain=0.029), 8, gaining(0.2)) == {}
    assert run(make(monkeypatch, AUTO, gain=0.03), 8, gaining(0.2)) == {2: STAGED}
    assert run(make(monkeypatch, AUTO, gain=0.2, can_prefetch=False), 8) == {}
    assert run(make(monkeypatch, AUTO, gain=0.2, can_stage=False), 8) == {}


@pytest.mark.parametrize(("num_steps", "tries"), [(3, False), (4, False), (5, True)])
def test_short_runs_try_nothing(monkeypatch, num_steps, tries):
    one = make(monkeypatch, AUTO, gain=0.2, num_steps=num_steps)
    assert bool(run(one, num_steps, gaining(0.2))) == tries
    assert one.verdict == ("kept" if tries else "too few steps")
    assert (one.decision() is not None) == tries


def test_short_runs_without_a_gain_say_nothing(monkeypatch):
    one = make(monkeypatch, AUTO, gain=0.0, num_steps=4)
    run(one, 4)
    assert one.verdict is None


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_model_calls_are_compared_where_steps_differ_in_their_number(monkeypatch, gain):
    """heun: two evaluations, each with cond and uncond apart; one in the step that is judged."""

    def calls(step):
        pair = [("cond", 1.0), ("uncond", 0.5)]
        return pair if step == 3 else pair * 2

    one = make(monkeypatch, AUTO, gain=0.2)
    changes = run(one, 8, gaining(gain), calls=calls)
    assert one.gain == pytest.approx(gain)
    assert changes == ({2: STAGED} if gain else {2: STAGED, 4: Setting()})


def test_steps_of_other_batches_are_not_compared(monkeypatch):
    """Guidance in an interval: cond and uncond in one call, later cond alone."""
    one = make(monkeypatch, AUTO, gain=0.2)
    calls = lambda step: [("both", 2.0)] if step < 3 else [("cond", 1.0)]  # noqa: E731
    assert run(one, 8, gaining(0.0), calls=calls) == {2: STAGED, 5: Setting()}
    assert one.verdict == "not comparable"
    assert one.decision() is None  # nothing was found out: a later run may try


@pytest.mark.parametrize(
    ("skips", "changes", "verdict"),
    [
        ({1}, {3: STAGED, 5: Setting()}, "undone"),  # waits for a whole step to measure
        ({2}, {2: STAGED, 5: Setting()}, "undone"),  # and for a second one to judge
        ({3}, {2: STAGED, 5: Setting()}, "undone"),
        ({2, 3}, {2: STAGED, 5: Setting()}, "not comparable"),
        ({3, 4}, {2: STAGED, 5: Setting()}, "not comparable"),
        ({1, 2, 3, 4, 5, 6}, {}, None),
    ],
)
def test_steps_with_skipped_blocks_are_not_compared(monkeypatch, skips, changes, verdict):
    one = make(monkeypatch, AUTO, gain=0.2)
    assert run(one, 9, gaining(0.0), skips=skips) == changes
    assert one.verdict == verdict


def test_a_module_in_two_places_does_not_look_skipped(monkeypatch):
    shared = SimpleNamespace()
    one = make(monkeypatch, AUTO, gain=0.2, modules=[shared, SimpleNamespace(), shared])
    assert run(one, 8, gaining(0.2)) == {2: STAGED}
    assert one.verdict == "kept"


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_stops_while_it_tries_has_found_nothing(monkeypatch, stop):
    one = make(monkeypatch, AUTO, gain=0.2)
    run(one, stop, gaining(0.2), breaks=True)
    assert one.trial is not None
    assert one.decision() is None


def test_auto_gives_way_where_the_device_is_short_and_is_judged(monkeypatch):
    """Kept where it ends spilling to RAM; else the device was not too full after all."""
    less = Setting(resident_bytes=700)
    for seconds, changes in ((0.5, {2: less}), (1.0, {2: less, 4: Setting()})):
        one = make(monkeypatch, AUTO, gain=0.0, is_short=True)
        took = seconds_of(plain=1.0, staged=1.0, first=1.0, less=seconds)
        assert run(one, 8, took) == changes
        assert one.decision().setting == (less if seconds < 1 else Setting())
        assert one.is_rolled_back == (seconds == 1)


def test_auto_makes_room_for_buffers_where_memory_is_classic(monkeypatch):
    """Then the plan's residency is tried together with prefetch, and undone together."""
    both = Setting(resident_bytes=500, first_blocks=(0, 2), prefetches=True)
    for gain, changes in ((0.2, {2: both}), (0.0, {2: both, 4: Setting()})):
        one = make(monkeypatch, AUTO, gain=0.2, needs_room=True)
        assert run(one, 8, gaining(gain)) == changes


def test_a_later_run_forgets_when_everything_fits(monkeypatch):
    for setting in (Setting(resident_bytes=500), STAGED):
        one = make(monkeypatch, AUTO, plan=all_resident([]))
        one.follow(Decision(setting=setting, predicted_step_seconds=None))
        assert run(one, 6) == {2: Setting()}
        assert one.decision() is None
        assert one.verdict is None


def test_speed_turns_prefetch_on(monkeypatch):
    one = make(monkeypatch, SPEED)
    assert run(one, 5, gaining(-0.02)) == {2: STAGED}
    assert one.predicted_step_seconds == 0.8
    assert not one.is_rolled_back
    assert one.stages


def test_speed_without_the_means(monkeypatch):
    assert run(make(monkeypatch, SPEED, can_prefetch=False), 5) == {}


def test_speed_slower_by_more_than_three_percent_goes_back(monkeypatch):
    one = make(monkeypatch, SPEED)
    assert run(one, 6, gaining(-0.04)) == {2: STAGED, 4: Setting()}
    assert one.is_rolled_back
    assert not one.stages
    assert one.predicted_step_seconds is None
    assert one.decision().setting == Setting()
    assert one.decision().is_rolled_back


def test_speed_keeps_what_could_not_be_judged(monkeypatch):
    one = make(monkeypatch, SPEED)
    assert run(one, 8, gaining(-0.5), skips={3, 4, 5, 6, 7}) == {2: STAGED}
    assert one.decision().setting == STAGED


def test_speed_in_three_steps_is_remembered(monkeypatch):
    one = make(monkeypatch, SPEED, num_steps=3)
    assert run(one, 3) == {2: STAGED}
    assert one.decision().setting == STAGED


def test_memory_starts_with_nothing_and_adds_what_the_plan_keeps(monkeypatch):
    one = make(monkeypatch, MEMORY)
    assert one.setting == Setting(resident_bytes=0, prefetches=True)
    changes = run(one, 6, lambda step, setting, first: 2.0 if step > 1 else 1.0)
    assert changes == {2: Setting(resident_bytes=500, first_blocks=(0, 2), prefetches=True)}
    assert not one.is_rolled_back  # more resident weights are not the reason for a slow step


def test_manual_measures_but_never_changes(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="manual", vram_budget_gb=1), is_short=True)
    assert one.setting == STAGED
    assert run(one, 6) == {}
    assert one.predicted_step_seconds == 0.8


def test_a_known_decision_is_followed(monkeypatch):
    known = Decision(setting=Setting(resident_bytes=7, prefetches=True), predicted_step_seconds=0.7)
    one = make(monkeypatch, SPEED, is_short=True)
    one.follow(known)
    assert one.setting == known.setting
    assert run(one, 6) == {}
    unable = make(monkeypatch, SPEED, can_prefetch=False)
    unable.follow(known)
    assert unable.setting == Setting()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_too_few_steps(monkeypatch, num_steps):
    one = make(monkeypatch, SPEED)
    assert run(one, num_steps) == {}
    assert one.decision() is None
    assert (one.steps.mean(one.settled_step) is None) == (num_steps == 0)


def test_weight_hooks_stop_the_planning(monkeypatch):
    one = make(monkeypatch, MEMORY)
    monkeypatch.setattr(host, "has_weight_hooks", lambda patcher: True)
    assert run(one, 5) == {}
    assert one.proposal is None


def test_the_reported_step_is_of_settled_steps(monkeypatch):
    """Not of the first one under a setting, nor of those that were undone."""
    one = make(monkeypatch, AUTO, gain=0.2)
    run(one, 9, gaining(-0.5))
    assert one.steps.mean(one.settled_step) == pytest.approx(1.0)
