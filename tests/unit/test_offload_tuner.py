"""The tuner on recorded steps: when it measures, plans, changes, judges and goes back."""

from types import SimpleNamespace

import pytest
import torch
from slipstream.backends.offload import host, tuner
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.offload.measure import Proposal
from slipstream.backends.offload.plan import Forecast, OffloadPlan, all_resident
from slipstream.backends.offload.tuner import JUDGED_STEP, MEASURED_STEP, Decision, Setting, Tuner

PLAN = OffloadPlan(
    resident_bytes=500,
    resident_blocks=(0, 2),
    depth=1,
    forecast=Forecast(seconds=1, stall_seconds=0),
    why="because",
)


class Clock:
    """Marks that the test sets."""

    def __init__(self, steps):
        self.now, self.marks = 0.0, iter([0.0, *steps])

    def mark(self):
        self.now += next(self.marks, 1.0)
        return self.now

    def seconds(self, begin, end):
        return end - begin


def make(monkeypatch, config, steps=(), *, is_short=False, can_prefetch=True, plan=PLAN):
    """A tuner whose steps take `steps` seconds and whose plan is PLAN."""
    proposal = Proposal(
        plan=plan, step_seconds=0.9, unchanged_seconds=0.8, prefetch_gain=0.2, is_short=is_short
    )
    monkeypatch.setattr(tuner.measure, "propose", lambda *args: proposal)
    monkeypatch.setattr(host, "has_weight_hooks", lambda patcher: False)
    patcher = SimpleNamespace(load_device=torch.device("cpu"))
    one = Tuner(patcher, config, [object()], can_prefetch=can_prefetch)
    one.steps.clock = Clock(steps)
    return one


def run(one, num_steps):
    """Settings that came into force, by step."""
    changes = {}
    for step in range(num_steps):
        changed = one.begin_step(0)
        if changed is not None:
            changes[step] = changed
        if one.times is not None:
            one.times.num_calls = 1
            one.times._marks[0] = [(0.0, 0.1, 0.5)]
    one.finish()
    return changes


def test_measures_two_steps_and_no_other(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="auto"))
    measured = []
    for step in range(6):
        one.begin_step(0)
        if one.times is not None:
            measured.append(step)
    assert measured == [MEASURED_STEP, JUDGED_STEP]


def test_auto_changes_nothing(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="auto"))
    assert run(one, 6) == {}
    assert one.proposal is not None
    assert one.predicted_step_seconds is None
    assert one.decision().setting == Setting()


def test_auto_gives_way_where_the_device_is_short(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="auto"), is_short=True)
    assert run(one, 3) == {2: Setting(resident_bytes=500, first_blocks=(0, 2))}


def test_a_slower_step_does_not_undo_what_a_full_device_needs(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="auto"), steps=[9, 1, 1, 5, 1], is_short=True)
    assert run(one, 6) == {2: Setting(resident_bytes=500, first_blocks=(0, 2))}
    assert not one.is_rolled_back


def test_a_later_run_takes_the_room_that_is_there_again(monkeypatch):
    gave_way = Setting(resident_bytes=500, first_blocks=(0, 2))
    known = Decision(setting=gave_way, predicted_step_seconds=None)
    for plan, changes in ((PLAN, {}), (all_resident([]), {2: Setting()})):
        one = make(monkeypatch, OffloadConfig(mode="auto"), steps=[9, 1, 1, 5], plan=plan)
        one.follow(known)
        assert one.setting == gave_way
        assert run(one, 6) == changes
        assert one.decision().setting == (changes.get(2) or gave_way)


def test_speed_turns_prefetch_on(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="speed"), steps=[9, 1, 1, 1.02, 1])
    assert run(one, 5) == {2: Setting(prefetches=True)}
    assert one.predicted_step_seconds == 0.8
    assert not one.is_rolled_back


def test_speed_without_the_means(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="speed"), can_prefetch=False)
    assert run(one, 5) == {}


def test_slower_by_more_than_three_percent_goes_back(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="speed"), steps=[9, 1, 1, 1.04, 1])
    assert run(one, 6) == {2: Setting(prefetches=True), 4: Setting()}
    assert one.is_rolled_back
    assert one.predicted_step_seconds is None
    assert one.decision() == Decision(
        setting=Setting(), predicted_step_seconds=None, is_rolled_back=True
    )


def test_memory_starts_with_nothing_and_adds_what_the_plan_keeps(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="memory"), steps=[9, 1, 1, 2, 1])
    assert one.setting == Setting(resident_bytes=0, prefetches=True)
    changes = run(one, 6)
    assert changes == {2: Setting(resident_bytes=500, first_blocks=(0, 2), prefetches=True)}
    assert not one.is_rolled_back  # more resident weights are not the reason for a slow step


def test_manual_measures_but_never_changes(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="manual", vram_budget_gb=1), is_short=True)
    assert one.setting == Setting(prefetches=True)
    assert run(one, 6) == {}
    assert one.predicted_step_seconds == 0.8


def test_a_known_decision_is_followed(monkeypatch):
    known = Decision(setting=Setting(resident_bytes=7, prefetches=True), predicted_step_seconds=0.7)
    one = make(monkeypatch, OffloadConfig(mode="speed"), is_short=True)
    one.follow(known)
    assert one.setting == known.setting
    assert run(one, 6) == {}
    unable = make(monkeypatch, OffloadConfig(mode="speed"), can_prefetch=False)
    unable.follow(known)
    assert unable.setting == Setting()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_too_few_steps(monkeypatch, num_steps):
    one = make(monkeypatch, OffloadConfig(mode="speed"))
    assert run(one, num_steps) == {}
    assert one.decision() is None
    assert (one.steps.mean(JUDGED_STEP) is None) == (num_steps == 0)


def test_weight_hooks_stop_the_planning(monkeypatch):
    one = make(monkeypatch, OffloadConfig(mode="memory"))
    monkeypatch.setattr(host, "has_weight_hooks", lambda patcher: True)
    assert run(one, 5) == {}
    assert one.proposal is None
