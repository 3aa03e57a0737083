"""OffloadConfig: bounds, sentences, the meaning of prefetch, the JSON that a worker gets."""

import itertools
import json

import pytest
from slipstream.backends.offload.config import GIB, MODES, OffloadConfig, OffloadError


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefetch", [-1, 0, 0.25, 1, 7])
def test_json_round_trip(mode, prefetch):
    config = OffloadConfig(mode=mode, vram_budget_gb=7.5, prefetch=prefetch)
    assert OffloadConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mode": "fast"}, "offload mode is 'fast': choose one of auto, speed, memory"),
        ({"vram_budget_gb": -1}, "vram_budget_gb is -1: use 0"),
        ({"vram_budget_gb": float("nan")}, "vram_budget_gb is nan"),
        ({"vram_budget_gb": float("inf")}, "vram_budget_gb is inf"),
        ({"prefetch": 1.5}, "prefetch is 1.5: it must be -1, a fraction below 1, or a whole"),
        ({"prefetch": -0.5}, "prefetch is -0.5"),
        ({"prefetch": -2}, "prefetch is -2"),
        ({"prefetch": float("nan")}, "prefetch is nan"),
    ],
)
def test_bad_values(fields, sentence):
    with pytest.raises(OffloadError, match=sentence):
        OffloadConfig(**fields)


def test_unknown_field():
    with pytest.raises(OffloadError, match="unknown fields: budget"):
        OffloadConfig.from_json({"mode": "auto", "budget": 3})


@pytest.mark.parametrize(
    ("prefetch", "depth"),
    [(-1, -1), (0, 1), (0.1, 7), (0.5, 31), (0.999, 60), (1, 1), (4, 4), (60, 60), (100, 60)],
)
def test_depth_in_sixty_blocks(prefetch, depth):
    """SGLang's meaning: below 1 a share of the blocks, from 1 on a number of them."""
    assert OffloadConfig(prefetch=prefetch).depth(60) == depth


def test_depth_grows_with_the_share_and_stays_in_bounds():
    for count in range(1, 70):
        depths = [OffloadConfig(prefetch=share / 20).depth(count) for share in range(20)]
        assert all(a <= b for a, b in itertools.pairwise(depths))
        assert depths[0] == 1
        assert depths[-1] <= count
    assert OffloadConfig().depth(0) == -1


def test_budget():
    assert OffloadConfig().budget_bytes is None
    assert OffloadConfig(vram_budget_gb=1.5).budget_bytes == 3 * GIB // 2
