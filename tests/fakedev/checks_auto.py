"""Mode auto on the fake accelerator: what it tries, undoes, remembers, and never gives up.

The device has no streams, so prefetch really gains nothing here; `expects` makes the planner expect
that it does. Devices are scaled to the tiny model: a device of 12 GiB for a model of 22.2 GiB is
one of 12 / 22.2 of the model's bytes, with aimdo's headroom and ComfyUI's reserve in proportion.
"""

import gc
import itertools

import comfy.model_management as management
import fake_vbar
import pytest
from fake_models import blocks, load, relative_error, sample
from offload_probe import NOTHING, in_mode, leftovers, report
from slipstream.backends.cache.apply import apply_cache
from slipstream.backends.cache.config import CacheConfig
from slipstream.backends.memory import host as memory
from slipstream.backends.offload import budget, host, measure
from slipstream.backends.offload.trial import Trial
from slipstream.backends.run import run_log

STEPS = 8
SAME = 1e-5  # core's attention for devices without a better one splits by what memory is free
MIB = 1 << 20
# GiB of weights and of the card, less its CUDA context
CARDS = {"Flux bf16 on 12 GB": ("flux", 22.2, 11.4), "Wan 14B on 16 GB": ("wan", 26.2, 15.4)}


def expects(monkeypatch, gain):
    """The planner expects that prefetch saves `gain` of a step."""
    propose = measure.propose

    def optimistic(*args):
        found = propose(*args)
        object.__setattr__(found, "prefetch_gain", gain)
        return found

    monkeypatch.setattr(measure, "propose", optimistic)
    monkeypatch.setattr(host, "copy_rates", lambda device: (5e9, 5e9))


def measure_gain(monkeypatch, found):
    """Set what a comparable trial gains; `found` lists what was really measured."""
    real = Trial.step_ended

    def to(value):
        def gain(self, measured):
            found.append(real(self, measured))
            return None if found[-1] is None else value

        monkeypatch.setattr(Trial, "step_ended", gain)

    return to


class Card:
    """A full device, scaled to `model`, and what each step finds resident."""

    def __init__(self, env, monkeypatch, model, weights_gib, card_gib, reserve_mib=400):
        self.model = model
        scale = memory.weight_bytes(model) / (weights_gib * 1024 * MIB)
        gc.collect()  # other models' address ranges
        used = env.device.total_bytes - env.device.free()
        env.device.total_bytes = used + int(card_gib * 1024 * MIB * scale)
        if env.manager == "dynamic":
            fake_vbar.Room.headroom_bytes = int(256 * MIB * scale)
        reserve = int(reserve_mib * MIB * scale)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: reserve)
        self.resident = []

    def see(self, step, *_):
        self.resident.append(memory.resident_bytes(self.model))


@pytest.mark.parametrize(
    ("card", "reserve_mib"),  # ComfyUI's reserve, on Linux and on Windows
    [("Flux bf16 on 12 GB", 400), ("Flux bf16 on 12 GB", 700), ("Wan 14B on 16 GB", 700)],
)
def test_auto_never_holds_less_than_without_the_node(env, monkeypatch, card, reserve_mib):
    """Prefetch gains nothing here: it is undone, what its buffers took comes back, and the next
    run does not try again. Two blocks of so small a model have no room under classic memory: there
    holding fewer weights is tried, and undone as well."""
    family, weights_gib, card_gib = CARDS[card]
    has_room = env.manager == "dynamic"
    model = load(family)
    # Two runs: with dynamic memory on, the first one makes the weights.
    sample(model, family)
    env.end_node()
    management.unload_all_models()
    one = Card(env, monkeypatch, model, weights_gib, card_gib, reserve_mib)
    wanted = sample(model, family, steps=STEPS, callback=one.see)
    env.end_node()
    plain, one.resident = one.resident, []
    expects(monkeypatch, 0.2)
    measure_gain(monkeypatch, [])(0.0)
    patched = in_mode(model, "auto")
    slack = 2 * fake_vbar.PAGE if env.manager == "dynamic" else 0
    for trial, tried in (("undone", {2, 3}), ("undone before", set())):
        one.resident = []
        latent = sample(patched, family, steps=STEPS, callback=one.see)
        env.end_node()
        assert relative_error(latent, wanted) < SAME
        found = report(patched)["offload"]
        assert found["trial"] == trial
        assert found["budget_bytes"] is None
        assert (found["block_copies"] > 0) == (has_room and bool(tried))
        for step, resident in enumerate(one.resident):
            if step not in tried:
                assert resident >= plain[-1] - slack, (trial, step, one.resident, plain)
            elif env.manager == "dynamic":  # what is missing are the buffers
                least = plain[-1] - found["buffer_bytes"] - 2 * slack
                assert resident >= least, (trial, step, one.resident, plain)
    assert 0 < plain[-1] < 0.7 * memory.placed_bytes(model)
    one.resident = []
    latent = sample(model, family, steps=STEPS, callback=one.see)  # without the node
    assert relative_error(latent, wanted) < SAME
    assert one.resident[-1] >= plain[-1] - slack
    assert leftovers(model) == NOTHING


def test_a_prefetch_that_gains_is_kept_from_the_first_step_of_the_next_run(env, monkeypatch):
    model = load("wan")
    num_blocks = len(blocks(model))
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    expects(monkeypatch, 0.2)
    measure_gain(monkeypatch, [])(0.2)
    patched = in_mode(model, "auto", 0.8)
    counts = []
    for trial in ("kept", "kept before"):
        assert sample(patched, "wan", steps=STEPS).equal(full)
        env.end_node()
        found = report(patched)["offload"]
        assert found["trial"] == trial
        assert found["prefetch_blocks"] == 1
        assert found["measured_gain"] == 0.2
        assert memory.resident_bytes(model) + found["buffer_bytes"] <= (
            found["budget_bytes"] + fake_vbar.PAGE
        )
        counts.append(found["block_copies"])
    # One more: classic stages the first block of a call that does not come any more.
    assert 0 < counts[0] <= (STEPS - 2) * num_blocks + 1
    assert counts[0] < counts[1] <= STEPS * num_blocks + 1


def test_real_times_undo_what_gains_nothing(env, monkeypatch):
    """The device copies in order, so a real trial cannot save four fifths: it is undone."""
    expects(monkeypatch, 0.9)
    monkeypatch.setattr("slipstream.backends.offload.tuner.MIN_GAIN", 0.8)
    patched = in_mode(load("wan"), "auto", 0.8)
    for trial in ("undone", "undone before"):
        sample(patched, "wan", steps=STEPS, shape=(1, 16, 3, 16, 16))
        env.end_node()
        found = report(patched)["offload"]
        assert found["trial"] == trial
        assert found["measured_gain"] < 0.8
        assert found["prefetch_blocks"] == 0
    assert found["block_copies"] == 0


def test_nothing_is_tried_without_an_expected_gain(env, monkeypatch):
    expects(monkeypatch, 0.02)
    patched = in_mode(load("wan"), "auto", 0.8)
    sample(patched, "wan", steps=STEPS)
    found = report(patched)["offload"]
    assert found["trial"] is None
    assert found["block_copies"] == 0
    assert patched.get_attachment(budget.KEY).decisions == {}


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_runs_try_nothing_and_say_so(env, monkeypatch, steps):
    expects(monkeypatch, 0.2)
    patched = in_mode(load("wan"), "auto", 0.8)
    sample(patched, "wan", steps=steps)
    assert report(patched)["offload"]["block_copies"] == 0
    text = run_log(patched).latest().to_text()
    assert ("not tried in" in text) == (steps > 2)  # sooner nothing is known


@pytest.mark.parametrize(
    ("options", "is_worth"),
    [
        ({"sampler": "heun", "split": True}, True),  # two evaluations of two calls, at last one
        ({"sampler": "heun"}, False),
        ({"cfg": 1.0}, True),
        ({"cfg": 4.0, "split": True}, False),
        pytest.param({"sampler": "dpmpp_sde", "cfg": 4.0}, True, marks=pytest.mark.full),
        pytest.param({"sampler": "heun", "cfg": 1.0}, False, marks=pytest.mark.full),
    ],
)
def test_other_ways_to_sample(env, monkeypatch, options, is_worth):
    options = {"steps": 5, **options}
    model = load("wan")
    full = sample(model, "wan", **options)
    env.end_node()
    expects(monkeypatch, 0.2)
    found = []
    gain = measure_gain(monkeypatch, found)
    gain(0.2 if is_worth else 0.0)
    patched = in_mode(model, "auto", 0.8)
    for _ in range(2):
        assert sample(patched, "wan", **options).equal(full)
        env.end_node()
    assert found[:2] == [None, *found[1:2]]  # the first step is not judged, the next one is
    assert found[1] is not None
    name = "kept before" if is_worth else "undone before"
    assert report(patched)["offload"]["trial"] == name
    assert sample(model, "wan", **options).equal(full)
    assert leftovers(model) == NOTHING


@pytest.mark.parametrize("cache_first", [False, True])
@pytest.mark.parametrize(
    ("hits", "trial"),
    [(1, ("kept", "kept before")), (2, ("not comparable", "not comparable"))],
)
def test_blocks_that_a_cache_skips_are_not_compared(env, monkeypatch, cache_first, hits, trial):
    """Of the steps behind the warm-up `hits` in a row are hits, then one is computed."""
    cache = CacheConfig(
        strategy="fbcache", engine="builtin", warmup=3, front_blocks=1,
        residual_diff_threshold=0.9, max_continuous_cached_steps=hits,
    )  # fmt: skip
    model = load("flux")
    wanted = sample(apply_cache(model, cache), "flux", steps=12)
    env.end_node()
    expects(monkeypatch, 0.2)
    measure_gain(monkeypatch, [])(0.2)
    if cache_first:
        both = in_mode(apply_cache(model, cache), "auto", 0.8)
    else:
        both = apply_cache(in_mode(model, "auto", 0.8), cache)
    for one in trial:
        assert sample(both, "flux", steps=12).equal(wanted)
        env.end_node()
        assert report(both)["offload"]["trial"] == one
    assert leftovers(model) == NOTHING


@pytest.mark.parametrize("stopped_in", [2, 3, 4])
def test_an_interrupt_while_it_tries_is_not_remembered(env, monkeypatch, stopped_in):
    model = load("wan")
    full = sample(model, "wan", steps=STEPS)
    env.end_node()
    kept = memory.resident_bytes(model)
    expects(monkeypatch, 0.2)
    patched = in_mode(model, "auto", 0.8)
    block, calls = type(blocks(model)[0]), itertools.count()
    forward, stop_at = block.forward, stopped_in * len(blocks(model)) + 3

    def interrupted(self, *args, **kwargs):
        if next(calls) == stop_at:
            raise management.InterruptProcessingException
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", interrupted)
    monkeypatch.setattr("slipstream.backends.offload.trial.LONGEST_TRIAL", 100)
    monkeypatch.setattr(
        "slipstream.backends.offload.tuner.Tuner._judge", lambda self, step: None
    )  # still open
    with pytest.raises(management.InterruptProcessingException):
        sample(patched, "wan", steps=STEPS)
    env.end_node()
    assert report(patched)["run"]["completed"] is False
    assert patched.get_attachment(budget.KEY).decisions == {}
    assert leftovers(model) == NOTHING
    assert sample(model, "wan", steps=STEPS).equal(full)  # without the node
    assert memory.resident_bytes(model) == kept
    assert budget.resident_cap(model) is None


def test_the_report_says_that_a_4_bit_file_would_fit(env, monkeypatch):
    family, weights_gib, card_gib = CARDS["Flux bf16 on 12 GB"]
    model = load(family)
    sample(model, family)
    env.end_node()
    management.unload_all_models()
    Card(env, monkeypatch, model, weights_gib, card_gib)
    sizes = {True: memory.weight_bytes(model) // 8, False: memory.weight_bytes(model)}
    for fits, size in sizes.items():  # so small a model has more branches than codes
        monkeypatch.setattr(
            "slipstream.backends.offload.state.four_bit_bytes", lambda network, size=size: size
        )
        patched = in_mode(model, "auto")
        sample(patched, family, steps=3)
        env.end_node()
        text = run_log(patched).latest().to_text()
        assert ("a 4-bit file of this model would fit: about" in text) == fits
        assert report(patched)["offload"]["four_bit_bytes"] == (size if fits else None)
