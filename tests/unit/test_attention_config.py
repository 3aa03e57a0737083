import re

import pytest
from comfy_home import PACK_ROOT
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig, AttentionError, parse_blocks
from slipstream.backends.attention.policy import BlockNumbers, Schedule
from slipstream.backends.attention.request import BlockKey
from slipstream.backends.position import Position


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"policy": "turbo"}, "Policy 'turbo' is not one of"),
        ({"backend": "sage9"}, "Backend 'sage9' is not known"),
        ({"policy": "manual"}, "Policy 'manual' needs a kernel in 'backend'"),
        ({"min_cos": 2}, "min_cos must be between -1 and 1; got 2."),
        ({"min_cos": float("nan")}, "min_cos must be between -1 and 1"),
        ({"max_rel_l1": -1}, "max_rel_l1 must be 0 or more"),
        ({"min_tokens": -5}, "min_tokens must be 0 or more; got -5."),
        (
            {"dense_blocks": "3-"},
            "dense_blocks takes numbers and ranges such as '0, 1, 47-49'; got '3-'.",
        ),
        ({"dense_blocks": "9-3"}, "got '9-3'"),
        ({"dense_blocks": "a"}, "got 'a'"),
    ],
)
def test_every_bad_setting_has_its_sentence(settings, sentence):
    with pytest.raises(AttentionError) as caught:
        AttentionConfig(**settings)
    assert sentence in str(caught.value)


def test_parse_blocks():
    assert parse_blocks("0, 1, 47-49") == {0, 1, 47, 48, 49}
    assert parse_blocks("") == frozenset()
    assert parse_blocks(" 3 - 4 ,") == {3, 4}


def test_config_round_trip():
    config = AttentionConfig(policy="fastest", dense_blocks="1-2", probe=False)
    assert AttentionConfig(**config.to_json()) == config


def test_schedule_for_all_lengths():
    config = AttentionConfig(dense_first_steps=2, dense_last_steps=1)
    for n in range(1, 30):
        schedule = Schedule(config, BlockNumbers({}), Position(0, n))
        dense = [schedule.dense_step(i) for i in range(n)]
        assert dense == [i < 2 or i == n - 1 for i in range(n)]


def test_automatic_schedule_keeps_long_runs_ends_exact_and_lets_few_steps_go():
    for n in range(1, 30):
        schedule = Schedule(AttentionConfig(), BlockNumbers({}), Position(0, n))
        dense = [i for i in range(n) if schedule.dense_step(i)]
        assert dense == ([] if n < 10 else [0, n - 1])


@pytest.mark.parametrize(
    ("position", "dense"),
    [
        (Position(0, 2, 2), []),  # a four-step pair
        (Position(2, 2, 0), []),
        (Position(0, 10, 10), [0]),  # a twenty-step pair: its ends count once
        (Position(10, 10, 0), [9]),  # also image to image: the layout is there already
    ],
)
def test_automatic_schedule_counts_the_whole_schedule(position, dense):
    schedule = Schedule(AttentionConfig(), BlockNumbers({}), position)
    assert [i for i in range(position.num_steps) if schedule.dense_step(i)] == dense


def test_steps_that_are_set_hold_in_short_runs_too():
    config = AttentionConfig(dense_first_steps=1, dense_last_steps=0)
    schedule = Schedule(config, BlockNumbers({}), Position(0, 4))
    assert [schedule.dense_step(i) for i in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("first", "last", "steps", "sentence"),
    [
        (1, 1, 20, "steps 0 and 19 exact by schedule"),
        (2, 3, 20, "steps 0-1 and 17-19 exact by schedule"),
        (1, 0, 4, "step 0 exact by schedule"),
        (0, 0, 4, ""),
        (2, 2, 4, "all steps exact by schedule"),
    ],
)
def test_schedule_in_words(first, last, steps, sentence):
    config = AttentionConfig(dense_first_steps=first, dense_last_steps=last)
    assert Schedule(config, BlockNumbers({}), Position(0, steps)).sentence() == sentence


def test_blocks_are_numbered_over_all_stacks():
    config = AttentionConfig(dense_blocks="18, 19")
    schedule = Schedule(config, BlockNumbers({"double": 0, "single": 19}), Position(0, 4))
    listed = [
        BlockKey("double", 18, 0), BlockKey("double", 18, 1), BlockKey("single", 0, 0)
    ]  # fmt: skip
    assert all(schedule.dense_block(key) for key in listed)
    assert not schedule.dense_block(BlockKey("single", 1, 0))
    assert not schedule.dense_block(BlockKey("double", 17, 0))
    assert not schedule.dense_block(BlockKey("refiner", 18, 0))  # in no stack: has no number


def test_missing_package_with_an_explicit_backend(monkeypatch):
    import sys

    for name in ("sageattention", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AttentionError, match=r"Backend 'sage1' is not available: .*pip install"):
        apply_attention(None, AttentionConfig(policy="manual", backend="sage1"))
    with pytest.raises(AttentionError, match="Backend 'flash3' is not available"):
        apply_attention(None, AttentionConfig(policy="manual", backend="flash3"))


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "nodes/attention.py",
        "nodes/web/docs/SlipstreamAttention.md",
        "workflows/slipstream-attention-image.json",
    ],
)
def test_policy_exact_is_said_to_be_what_it_is(file):
    """Not "output-preserving": who reads that expects the same pixels."""
    text = (PACK_ROOT / file).read_text(encoding="utf-8").replace('"', "")
    text = " ".join(text.split())
    assert re.search(r"same mathematics[ ,a-z]*other rounding", text)
    assert not re.search(r"exact[^.]*(up to|by) rounding", text)
