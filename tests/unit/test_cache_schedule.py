"""Which steps may reuse: masks of every length, verdicts, counts, the suggested threshold."""

from dataclasses import replace

import pytest
from slipstream.backends.cache.decisions import OVERRULED, Decision, Event
from slipstream.backends.cache.schedule import (
    ASK,
    COMPUTE,
    REUSE,
    SCM_SHARES,
    Schedule,
    counts_mask,
    make_mask,
    named_mask,
    parse_counts,
)
from slipstream.backends.cache.section import num_hits, zero_reuse_sentence


def longest_gap(mask):
    return max(len(run) for run in "".join(map(str, mask)).split("1"))


@pytest.mark.parametrize("num_steps", range(1, 61))
def test_masks_compute_the_first_and_the_last_step(num_steps):
    masks = [make_mask(num_steps, share) for share in (0.0, 0.28, 0.5, 0.75, 1.0)]
    masks += [make_mask(num_steps, 0.5, dense=4), *(named_mask(n, num_steps) for n in SCM_SHARES)]
    for mask in masks:
        assert len(mask) == num_steps
        assert set(mask) <= {0, 1}
        assert mask[0] == mask[-1] == 1
    assert make_mask(num_steps, 1.0) == (1,) * num_steps


@pytest.mark.parametrize("num_steps", range(9, 61))
def test_zeros_are_spread_evenly_behind_the_dense_start(num_steps):
    for share in (0.28, 0.4, 0.5, 0.75):
        mask = make_mask(num_steps, share)
        zeros, ones = mask.count(0), sum(mask)
        assert abs(ones - share * num_steps) <= 1
        dense = mask.index(0)
        assert longest_gap(mask) <= zeros // max(ones - dense, 1) + 1
    assert longest_gap(named_mask("ultra", 20)) == 5  # cache-dit 1.5.3 makes a gap of 15 here
    assert longest_gap(named_mask("fast", 20)) == 3  # and 11 here


def test_short_runs_compute_more_than_half():
    assert [sum(make_mask(n, 0.28)) for n in range(1, 9)] == [1, 2, 2, 3, 3, 4, 4, 5]


def test_verdicts():
    plain = Schedule(num_steps=10, warmup=3, cooldown=2)
    assert [plain.verdict(i) for i in range(10)] == [COMPUTE] * 3 + [ASK] * 5 + [COMPUTE] * 2
    assert plain.num_open == plain.num_asked == 5
    sparse = Schedule(num_steps=10, warmup=4, warmup_interval=2, cooldown=1)
    assert [sparse.verdict(i) for i in range(5)] == [COMPUTE, ASK, COMPUTE, ASK, ASK]
    mask = (1, 0, 1, 0, 0, 1)
    static = Schedule(num_steps=6, mask=mask, static=True)
    assert [static.verdict(i) for i in range(6)] == [COMPUTE, REUSE, COMPUTE, REUSE, REUSE, COMPUTE]
    assert static.num_open == 3
    assert static.num_asked == 0
    dynamic = Schedule(num_steps=6, mask=mask)
    assert [dynamic.verdict(i) for i in range(6)].count(ASK) == 3


def test_warmup_and_cooldown_win_over_the_mask():
    schedule = Schedule(num_steps=6, warmup=2, cooldown=2, mask=(0,) * 6, static=True)
    verdicts = [schedule.verdict(i) for i in range(6)]
    assert verdicts == [COMPUTE, COMPUTE, REUSE, REUSE, COMPUTE, COMPUTE]
    assert [schedule.reason(i) for i in (0, 5)] == ["warmup", "cooldown"]


def test_counts():
    assert counts_mask(parse_counts("3, 1,2,3 ,1"), 10) == (1, 1, 1, 0, 1, 1, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"^scm counts add up to 18, the run has 20 steps\.$"):
        counts_mask((6, 1, 3, 2, 6), 20)
    for text in ("six", "6,-1", "6,,1", "6,0,1", ""):
        with pytest.raises(ValueError, match=r"^scm is '.*': choose off, slow"):
            parse_counts(text)


def events(diffs, reuse=()):
    return [
        Event(i, i, "cond", Decision(i in reuse, diff, "above threshold"))
        for i, diff in enumerate(diffs)
    ]


def test_zero_reuse_names_the_range_and_a_threshold_that_would_have_reused_a_third():
    diffs = [None, 0.5, 0.4, 0.3, 0.25, 0.2, 0.35, 0.31, 0.45]
    sentence = zero_reuse_sentence("cache-dit", events(diffs), 0.08, 7)
    assert sentence == (
        "cache-dit reused nothing: the change between steps was 0.2 to 0.5, the threshold is 0.08; "
        "a threshold of 0.301 would have reused about a third of the steps."
    )
    below = [d for d in diffs if d is not None and d < 0.301]
    assert len(below) == len(diffs) // 3


def test_zero_reuse_has_a_sentence_for_every_cause():
    nothing_open = zero_reuse_sentence("cache-dit", events([None] * 4), 0.1, 0)
    assert "warmup and cooldown cover all steps" in nothing_open
    too_far = zero_reuse_sentence("fbcache", events([1.5, 2.0, 1.8]), 0.1, 3)
    assert "differ too much" in too_far
    assert "1.5 to 2" in too_far
    assert "above threshold" in zero_reuse_sentence("pab", events([None] * 3), None, 3)
    broken = zero_reuse_sentence("fbcache", events([float("nan")] * 3), 0.1, 3)
    assert "every call was computed" in broken  # a broken picture is reported, never an exception
    below = [replace(e, decision=Decision(False, 0.1, OVERRULED)) for e in events([0.1] * 3)]
    overruled = zero_reuse_sentence("fbcache", [*events([None]), *below], 0.48, 3)
    assert "sequence parallel computed 3 of 4 calls that it would have reused" in overruled
    assert zero_reuse_sentence("cache-dit", events([0.1, 0.2], reuse=(1,)), 0.15, 2) is None
    assert zero_reuse_sentence("cache-dit", [], 0.1, 3) is None


def test_an_evaluation_counts_as_reused_only_if_all_its_branches_were():
    both = [Event(5, 5, b, Decision(r, None, "")) for b, r in (("cond", True), ("uncond", True))]
    half = [Event(6, 6, b, Decision(r, None, "")) for b, r in (("cond", True), ("uncond", False))]
    assert num_hits(both + half) == 1
