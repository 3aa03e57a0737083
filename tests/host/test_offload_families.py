"""What offload knows of every family: its blocks in the order they run, and nothing left behind."""

from contextlib import contextmanager
from itertools import groupby

import pytest
import tiny
from cache_runs import equal
from slipstream.backends import architectures
from slipstream.backends.offload.blocks import hooks, units_of

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.mark.parametrize("family", list(tiny.ALL))
def test_blocks_are_staged_in_order(family):
    model = tiny.load(family)
    network = model.model.diffusion_model
    units = units_of(network, architectures.find(network))
    if not units:
        pytest.skip(f"{family}: no block stack")
    # HiDream-O1 keeps keys of the prompt from run to run, and rounds otherwise with them.
    plain = tiny.sample(tiny.load(family), family, steps=1, cfg=1.0)
    ran = []

    @contextmanager
    def around(position):
        ran.append(position)
        yield

    with hooks(units, around):
        out = tiny.sample(model, family, steps=1, cfg=1.0)
    places = {id(unit.module): place for place, unit in reversed(list(enumerate(units)))}
    # Qwen-Image 2.1 runs each block twice in a run's first call, the text and then the picture.
    assert [position for position, _ in groupby(ran)] == sorted(places.values())
    assert equal(out, plain)
    assert all("forward" not in module.__dict__ for module in network.modules())
