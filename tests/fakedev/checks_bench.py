"""The GPU measurement's own program, on tiny models of the fake accelerator."""

import fake_models
import pytest
import tiny
from slipstream.backends.offload import host
from slipstream.bench import offload, offload_models, offload_steps


@pytest.fixture
def case(env):
    shape = tiny.latent_shape("wan")
    return offload_models.Case(
        load=lambda: fake_models.load("wan"),
        sizes={"small": shape, "large": (1, 16, 3, 16, 16)},
        conditioning=lambda: tiny.text("wan"),
        steps=6,
    )


def test_everything_is_measured(case, monkeypatch):
    monkeypatch.setattr(host, "copy_rates", lambda device: (5e9, 2e9))
    found = {"model": "wan", "manager": "any", **offload_steps.measure(case, num_runs=4)}
    assert found["equal_bits"]
    assert found["equal_bits_cached"]
    assert [cap["share"] for cap in found["caps"]] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert found["caps"][-1]["refilled"] > 0.95
    assert all(one["prefetch"] > 0 for one in found["times"])
    assert found["plan"]["measured"] > 0
    assert found["flat"]["growth_bytes"]["device"] <= 1 << 20
    assert len(offload.lines(found)) > 8
