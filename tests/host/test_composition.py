"""The composition matrix: core's model nodes, samplers and guiders under every technique.

Output-preserving techniques give what the core node gives alone; a cache keeps what the node does
to the picture. Everything runs in ./test full, a slice of it in ./test (tests/composition.py).
"""

import functools

import composition
import composition_runs
import core_nodes
import pytest
import tiny
import torch
from composition import CASES, EQUAL, UNTESTED
from composition_runs import GUIDERS, SVDQUANT, UNET, relative
from slipstream.backends.attention.apply import apply_attention
from slipstream.backends.attention.config import AttentionConfig
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.conflicts import ConflictError
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import OffloadConfig
from slipstream.backends.run import run_log
from slipstream.parallel.apply import apply_parallel, pool
from slipstream.parallel.config import SequenceParallelConfig

pytestmark = pytest.mark.usefixtures("comfy", "workers")
STEPS, CACHED_STEPS = 3, 8
ORDERS = ("behind", "before")  # the technique's node behind core's, or before it


@pytest.fixture(scope="module")
def workers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    pool().close()
    for kept in (composition_runs.load, plain, plain_cached, alone):
        kept.cache_clear()
    torch.set_num_threads(threads)


# --- the techniques


def attention(model, family):
    return apply_attention(model, AttentionConfig(policy="manual", backend="math", min_tokens=0))


def offload(model, family):
    return apply_offload(model, OffloadConfig())


def parallel(model, family):
    return apply_parallel(model, SequenceParallelConfig(workers=2, devices="cpu,cpu", timeout_s=30))


def cache(model, family):
    if family == UNET:
        return apply_cache(model, CacheConfig.from_ratio(0.5, strategy="deepcache"))
    static = {"strategy": "scm", "scm": "3,1,2,1,1", "scm_policy": "static", "warmup": 0}
    return apply_cache(model, CacheConfig(**static, engine="builtin", front_blocks=1))


LOSSLESS = {"attention": attention, "offload": offload, "parallel": parallel}
TECHNIQUES = {**LOSSLESS, "cache": cache}


def section(model, name):
    return run_log(model).latest().to_json()[name]


# --- nodes that patch a MODEL


def pairs():
    """(node, family, whether ./test has it)."""
    for name, case in CASES.items():
        for family in case.families:
            yield name, family, family in case.quick
        has_own_tests = name.startswith(("ModelMerge", "Lora"))  # host/test_svdquant_*.py
        if "flux" in case.families and not has_own_tests:
            yield name, SVDQUANT, SVDQUANT in case.quick


def params(techniques):
    """Node, family, technique, order; `full` but for a slice."""
    return [
        pytest.param(
            name, family, technique, order,
            marks=() if quick and order == ORDERS[0] else pytest.mark.full,
            id=f"{name}-{family}-{technique}-{order}",
        )
        for name, family, quick in pairs()
        for technique in techniques
        for order in ORDERS
        if family != SVDQUANT or order == ORDERS[0]
    ]  # fmt: skip


@functools.cache
def plain(family, name, steps):
    """The run that `name` would be without any node."""
    return composition.sample(composition_runs.load(family), family, name, steps=steps)


@functools.cache
def alone(name, family, steps):
    model = composition.patched(name, family, composition_runs.load(family))
    return composition.sample(model, family, name, steps=steps)


def both(name, family, technique, order):
    """The MODEL behind core's node and the technique's."""
    model, apply = composition_runs.load(family), TECHNIQUES[technique]
    if order == "behind":
        return apply(composition.patched(name, family, model), family)
    return composition.patched(name, family, apply(model, family))


def assert_plain_is_as_before(name, family, steps):
    again = composition.sample(composition_runs.load(family), family, name, steps=steps)
    assert torch.equal(again, plain(family, name, steps)), "the node's traces are on the model"


def test_every_node_of_core_is_here(comfy):
    """A new one: give it a Case in tests/composition.py, or the reason why it has none."""
    assert core_nodes.of_kind("MODEL", takes="MODEL") == set(CASES) | set(UNTESTED)
    assert not set(CASES) & set(UNTESTED)
    assert core_nodes.of_kind("GUIDER") == set(GUIDERS)
    samplers, left_out = (
        set(composition_runs.SAMPLER_NODES),
        set(composition_runs.UNTESTED_SAMPLER_NODES),
    )
    assert core_nodes.of_kind("SAMPLER") == samplers | left_out


def test_every_sampler_and_scheduler_of_core_is_here(comfy):
    from comfy.samplers import KSampler

    assert tuple(KSampler.SAMPLERS) == composition_runs.SAMPLERS
    assert tuple(KSampler.SCHEDULERS) == composition_runs.SCHEDULERS


@pytest.mark.full
@pytest.mark.parametrize(("name", "family"), [pair[:2] for pair in pairs()])
def test_the_node_alone_acts(name, family):
    """Or equality with it would prove nothing."""
    effect = relative(alone(name, family, STEPS), plain(family, name, STEPS))
    assert (effect > 1e-5) == (family not in CASES[name].idle), effect


@pytest.mark.parametrize(("name", "family", "technique", "order"), params(LOSSLESS))
def test_equal_to_the_node_alone(name, family, technique, order):
    expected = alone(name, family, STEPS)
    assert torch.isfinite(expected).all()
    plain(family, name, STEPS)
    model = both(name, family, technique, order)
    out = composition.sample(model, family, name, steps=STEPS)
    found = section(model, technique)
    if technique == "offload":
        assert torch.equal(out, expected)
    assert relative(out, expected) <= CASES[name].equal
    if technique == "parallel":
        reason = "No token plan" if family == UNET else CASES[name].alone
        assert bool(found["calls_local"]) == bool(reason), found["reasons"]
        assert all(reason in one for one in found["reasons"])
    assert_plain_is_as_before(name, family, STEPS)


@pytest.mark.parametrize(("name", "family", "technique", "order"), params(["cache"]))
def test_a_cache_keeps_what_the_node_does(name, family, technique, order):
    case = CASES[name]
    model = both(name, family, technique, order)
    if technique in case.refused:
        with pytest.raises(ConflictError, match=case.refused[technique]):
            composition.sample(model, family, name, steps=CACHED_STEPS)
        return
    effect = alone(name, family, CACHED_STEPS) - plain(family, name, CACHED_STEPS)
    out = composition.sample(model, family, name, steps=CACHED_STEPS)
    assert torch.isfinite(out).all()
    assert section(model, "cache")["blocks_skipped"] > 0
    if family not in case.idle:
        kept = out - plain_cached(family, name)
        share = (kept * effect).sum() / effect.square().sum()
        assert share > 0.9, "the cache takes of what the node does"
        assert torch.cosine_similarity(kept.flatten(), effect.flatten(), 0) > 0.7
    assert_plain_is_as_before(name, family, CACHED_STEPS)


@functools.cache
def plain_cached(family, name):
    model = cache(composition_runs.load(family), family)
    return composition.sample(model, family, name, steps=CACHED_STEPS)


# --- samplers, schedulers, guiders: every one under every technique


def assert_composes(technique, family, run):
    """run(model, steps): the latent. Equal where the technique preserves it; a cache reuses."""
    model = composition_runs.load(family)
    steps = CACHED_STEPS if technique == "cache" else STEPS
    expected = run(model, steps)
    assert torch.isfinite(expected).all()
    with_it = TECHNIQUES[technique](model, family)
    out = run(with_it, steps)
    found = section(with_it, technique)
    if technique == "cache":
        assert torch.isfinite(out).all()
        assert found["blocks_skipped"] > 0
    elif technique == "parallel":
        assert found["calls_distributed"] > 0
        # prompts of one call are rows, computed in matrices of other shapes, and a guider
        # multiplies the rounding: 2.3e-6 under DualCFGGuider
        assert relative(out, expected) <= 2 * EQUAL
    else:
        assert relative(out, expected) <= (0 if technique == "offload" else EQUAL)
    assert torch.equal(run(model, steps), expected)


def grid(names, quick):
    """Name, technique; `full` but for `quick` ones under sequence parallel."""
    return [
        pytest.param(
            name, technique,
            marks=() if name in quick and technique == "parallel" else pytest.mark.full,
            id=f"{name}-{technique}",
        )
        for name in names
        for technique in TECHNIQUES
    ]  # fmt: skip


def cfg_pp():
    return [name for name in composition_runs.SAMPLERS if name.endswith("cfg_pp")]


@pytest.mark.parametrize(("name", "technique"), grid(composition_runs.SAMPLERS, cfg_pp()))
def test_samplers(name, technique):
    def run(model, steps):
        return tiny.sample(model, "flux", steps=steps, cfg=1.5, sampler=name)

    assert_composes(technique, "flux", run)


@pytest.mark.parametrize(("name", "technique"), grid(composition_runs.SCHEDULERS, ()))
def test_schedulers(name, technique):
    def run(model, steps):
        return tiny.sample(model, "wan", steps=steps, scheduler=name)

    assert_composes(technique, "wan", run)


@pytest.mark.full
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", composition_runs.SAMPLER_NODES)
def test_sampler_nodes(name, technique):
    def run(model, steps):
        sampler = composition_runs.sampler_of(name, model)
        return composition_runs.guided(model, "flux", "CFGGuider", steps=steps, sampler=sampler)

    assert_composes(technique, "flux", run)


@pytest.mark.parametrize("technique", [
    pytest.param(name, marks=() if name == "parallel" else pytest.mark.full) for name in TECHNIQUES
])  # fmt: skip
@pytest.mark.parametrize(
    ("name", "family"), [(name, one) for name, (families, _) in GUIDERS.items() for one in families]
)
def test_guiders(name, family, technique):
    def run(model, steps):
        return composition_runs.guided(model, family, name, steps=steps)

    assert_composes(technique, family, run)
