"""A run with a node of ours has room for its frames, wherever the sampler is called from."""

import sys

import pytest
import tiny
from cache_runs import cached
from page_faults import DEPTHS, at_depth, num_faults

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are not in chunks there")
def test_no_call_depth_maps_memory_at_every_step():
    plain = tiny.load("flux")
    most = {}
    for name, model in (("plain", plain), ("patched", cached(plain))):

        def faults_of(steps, model=model):
            return num_faults(lambda: tiny.sample(model, "flux", steps=steps))

        def of_six_steps(faults_of=faults_of):
            # the fewer of two, since in any run the allocator may ask for more
            few, many = (min(faults_of(steps), faults_of(steps)) for steps in (6, 12))
            return many - few

        of_six_steps()
        most[name] = max(at_depth(depth, of_six_steps) for depth in DEPTHS[::4])
    assert most["plain"] > 120, "no depth was unlucky: nothing is proved"
    assert most["patched"] < most["plain"] / 4
