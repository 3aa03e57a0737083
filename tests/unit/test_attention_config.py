import pytest
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig, AttentionError, parse_blocks
from slipstream.backends.attention.policy import BlockNumbers, Schedule
from slipstream.backends.attention.request import BlockKey


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
    schedule = Schedule(config, BlockNumbers({}))
    for n in range(1, 30):
        dense = [schedule.dense_step(i, n) for i in range(n)]
        assert dense == [i < 2 or i == n - 1 for i in range(n)]


def test_blocks_are_numbered_over_all_stacks():
    config = AttentionConfig(dense_blocks="18, 19")
    schedule = Schedule(config, BlockNumbers({"double": 0, "single": 19}))
    listed = [
        BlockKey("double", 18, 0), BlockKey("double", 18, 1), BlockKey("single", 0, 0)
    ]  # fmt: skip
    assert all(schedule.dense_block(key) for key in listed)
    assert not schedule.dense_block(BlockKey("single", 1, 0))
    assert not schedule.dense_block(BlockKey("double", 17, 0))


def test_missing_package_with_an_explicit_backend(monkeypatch):
    import sys

    for name in ("sageattention", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AttentionError, match=r"Backend 'sage1' is not available: .*pip install"):
        apply_attention(None, AttentionConfig(policy="manual", backend="sage1"))
    with pytest.raises(AttentionError, match="Backend 'flash3' is not available"):
        apply_attention(None, AttentionConfig(policy="manual", backend="flash3"))
