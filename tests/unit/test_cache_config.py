"""CacheConfig: the ratio table, presets, round trip, and a sentence for every bad value."""

import itertools

import pytest
from slipstream.backends.cache.config import PRESETS, STRATEGIES, CacheConfig, from_preset

# ratio: (threshold, max_continuous, front_blocks, compute_share, deep_interval)
TABLE = {
    0.0: (0.06, 1, 8, 0.75, 2),
    0.25: (0.12, 2, 4, 0.6325, 3),
    0.5: (0.24, 3, 2, 0.515, 3),
    0.75: (0.35, 4, 1, 0.3975, 4),
    1.0: (0.50, 6, 1, 0.28, 5),
}


@pytest.mark.parametrize("ratio", TABLE)
def test_ratio_table(ratio):
    config = CacheConfig.from_ratio(ratio)
    row = (
        config.residual_diff_threshold,
        config.max_continuous_cached_steps,
        config.front_blocks,
        config.compute_share,
        config.deep_interval,
    )
    assert row == pytest.approx(TABLE[ratio])
    assert config.cache_ratio == ratio


def test_more_ratio_is_never_more_careful():
    configs = [CacheConfig.from_ratio(i / 20) for i in range(21)]
    for careful, fast in itertools.pairwise(configs):
        assert fast.residual_diff_threshold > careful.residual_diff_threshold
        assert fast.max_continuous_cached_steps >= careful.max_continuous_cached_steps
        assert fast.front_blocks <= careful.front_blocks
        assert fast.compute_share < careful.compute_share
        assert fast.deep_interval >= careful.deep_interval
        assert fast.cross_range >= careful.cross_range >= careful.self_range
        assert fast.cfg_interval >= careful.cfg_interval


def test_json_round_trip():
    config = CacheConfig.from_ratio(0.3, strategy="scm", warmup=2, engine="builtin", scm="6,1,3")
    assert CacheConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown fields: colour"):
        CacheConfig.from_json('{"colour": 1}')


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_one_parameter_set(strategy):
    assert CacheConfig.from_ratio(0.5, strategy=strategy).strategy == strategy


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strategy": "turbo"}, "strategy is 'turbo': choose one of auto, cache-dit"),
        ({"engine": "gpu"}, "engine is 'gpu': choose one of auto, cache-dit, builtin"),
        ({"cfg_mode": "both"}, "cfg_mode is 'both': choose one of shared, separate"),
        ({"warmup": -1}, "warmup is -1: choose a value from 0 to"),
        ({"cooldown": 0}, "cooldown is 0: choose a value from 1 to"),
        ({"back_blocks": -2}, "back_blocks is -2"),
        ({"calibrator": "magic"}, "calibrator is 'magic'"),
        ({"scm": "warp"}, "scm is 'warp': choose off, slow, medium, fast or ultra"),
        ({"calibrator": "foca", "engine": "builtin"}, "calibrator foca comes with cache-dit"),
    ],
)
def test_bad_values_raise_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        CacheConfig(**fields)


@pytest.mark.parametrize("ratio", [-0.1, 1.2])
def test_ratio_outside_0_to_1(ratio):
    with pytest.raises(ValueError, match=f"^cache_ratio is {ratio}: choose a value from 0 to 1$"):
        CacheConfig.from_ratio(ratio)


def test_a_threshold_of_one_is_lowered_because_cache_dit_would_reuse_without_comparing():
    assert CacheConfig(residual_diff_threshold=1.0).residual_diff_threshold == 0.99


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_name(preset):
    config, note = from_preset(preset)
    assert note is None
    assert config.strategy == "cache-dit"
    assert config.cache_ratio is None
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value


def test_a_preset_wins_over_changed_widgets_and_says_so():
    config, note = from_preset("balanced", front_blocks=5, calibrator="taylorseer")
    assert config.front_blocks == 1
    assert config.calibrator == "taylorseer"
    assert note == "Preset balanced wins over front_blocks 5: set preset to custom"
    custom, note = from_preset("custom", front_blocks=5)
    assert custom.front_blocks == 5
    assert note is None
    with pytest.raises(ValueError, match="preset is 'best': choose one of custom, quality"):
        from_preset("best")
