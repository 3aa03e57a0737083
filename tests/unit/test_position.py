"""Where a run's steps lie in the whole schedule, from its sigmas alone."""

import pytest
from slipstream.backends.position import Position, percent_of, position_of


def flow(shift):
    """percent -> sigma of a flow model, as ComfyUI's ModelSamplingDiscreteFlow has it."""

    def percent_to_sigma(percent):
        if percent <= 0.0:
            return 1.0
        t = 1.0 - percent
        return shift * t / (1 + (shift - 1) * t)

    return percent_to_sigma


def simple(num_steps, shift):
    """Sigmas at even percents: the schedulers simple and sgm_uniform."""
    return [flow(shift)(i / num_steps) for i in range(num_steps)] + [0.0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_percent_is_the_inverse(shift):
    for percent in (0.1, 0.5, 0.9):
        assert percent_of(flow(shift)(percent), flow(shift)) == pytest.approx(percent, abs=1e-5)
    assert percent_of(0.0, flow(shift)) == 1.0
    assert percent_of(1.0, flow(shift)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 20, 50])
def test_whole_schedules_and_halves(shift, num_steps):
    sigmas, schedule = simple(num_steps, shift), flow(shift)
    assert position_of(sigmas, schedule) == Position(0, num_steps, 0)
    if num_steps >= 4:
        half = num_steps // 2
        high = position_of(sigmas[: half + 1], schedule)
        low = position_of(sigmas[half:], schedule)
        assert high == Position(0, half, half)
        assert low == Position(half, half, 0)
        assert (high.from_start(0), high.from_end(half - 1)) == (0, half)
        assert (low.from_start(0), low.from_end(half - 1)) == (half, 0)


def test_image_to_image_begins_in_the_middle():
    sigmas = simple(20, 3.0)[10:]
    assert position_of(sigmas, flow(3.0)) == Position(10, 10, 0)


def test_leftover_noise_is_a_part():
    assert position_of(simple(20, 1.0)[:6], flow(1.0)).after == 15


def test_first_step_left_out_is_whole():
    """ddim_uniform starts one step below the highest sigma."""
    assert position_of(simple(20, 3.0)[1:], flow(3.0)).before == 0


def test_uneven_steps_do_not_make_the_other_part_endless():
    sigmas = [1e-3, 1e-4, 0.0]
    assert position_of(sigmas, flow(3.0)).whole <= 8


def test_rising_sigmas_and_models_without_a_schedule():
    assert position_of([0.0, 0.5, 1.0], flow(1.0)) == Position(0, 2, 0)
    assert position_of([1.0, 0.5, 0.0], None) == Position(0, 2, 0)
    assert position_of([], None) == Position(0, 0, 0)
