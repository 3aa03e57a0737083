"""Technique x technique on one MODEL: each pair, in either order, gives what one of them gives.

Output-preserving techniques must leave the other's result as it is; the cache's decisions must
not change with what runs beside it.
"""

import itertools

import pytest
import tiny
import torch
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.run import run_log
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig

pytestmark = pytest.mark.usefixtures("comfy")

STEPS = 8


def attention(model):
    config = AttentionConfig(policy="manual", backend="math", min_tokens=0)
    return apply_attention(model, config)


def cache(model):
    return apply_cache(
        model, CacheConfig.from_ratio(0.8, strategy="scm", engine="builtin").with_(front_blocks=1)
    )


def offload(model):
    return apply_offload(model, OffloadConfig())


def parallel(model):
    return apply_parallel(model, SequenceParallelConfig(workers=2, devices="cpu,cpu"))


TECHNIQUES = {"attention": attention, "cache": cache, "offload": offload, "parallel": parallel}


@pytest.fixture(scope="module", autouse=True)
def no_workers_left():
    yield
    pool().close()


@pytest.fixture(scope="module", params=["flux", "wan"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny.load(family)


@pytest.fixture(scope="module")
def expected(model, family):
    """The plain result, and the result of the cache alone."""
    plain = tiny.sample(model, family, steps=STEPS)
    cached = cache(model)
    alone = tiny.sample(cached, family, steps=STEPS)
    assert hits(cached) > 0
    assert relative(alone, plain) > 1e-5, "the cache must change something, or this proves nothing"
    return {"plain": plain, "cache": alone, "hits": hits(cached)}


def hits(model):
    return run_log(model).latest().to_json()["cache"]["hits"]


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(TECHNIQUES, 2)))
def test_pair(model, family, expected, first, second):
    both = TECHNIQUES[second](TECHNIQUES[first](model))
    out = tiny.sample(both, family, steps=STEPS)
    record = run_log(both).latest().to_json()
    assert {first, second} <= set(record)
    if "cache" in (first, second):
        assert record["cache"]["hits"] == expected["hits"]
    if "parallel" in (first, second):
        assert record["parallel"]["calls_distributed"] > 0, record["parallel"]["reasons"]
    want = expected["cache" if "cache" in (first, second) else "plain"]
    assert relative(out, want) <= 5e-6
    assert torch.equal(tiny.sample(model, family, steps=STEPS), expected["plain"])


def test_all_four(model, family, expected):
    everything = offload(attention(cache(parallel(model))))
    out = tiny.sample(everything, family, steps=STEPS)
    record = run_log(everything).latest().to_json()
    assert set(TECHNIQUES) <= set(record)
    assert record["parallel"]["calls_distributed"] > 0, record["parallel"]["reasons"]
    assert record["cache"]["hits"] == expected["hits"]
    assert relative(out, expected["cache"]) <= 5e-6
    assert torch.equal(tiny.sample(model, family, steps=STEPS), expected["plain"])
