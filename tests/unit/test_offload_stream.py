"""The block streamer on plain torch blocks: order of copies and uses, skips, exceptions, leftovers.

A lane that copies as late as it may catches a missing wait before a use; plain copying, which
fills a buffer at once, catches a buffer that is overwritten too early.
"""

import pytest
import torch
from slipstream.backends.offload import stream
from slipstream.backends.offload.blocks import Unit, hooks, module_sizes, parts_of
from slipstream.backends.offload.driver import BlockDriver
from slipstream.backends.offload.lane import InOrderLane
from slipstream.backends.offload.stream import Streamer
from slipstream.backends.offload.timing import BlockTimes, DeviceClock

CPU = torch.device("cpu")
NUM = 5


class LateLane(InOrderLane):
    """Copies when somebody waits for them, not before: the worst a real copy stream may do."""

    def __init__(self):
        self.pending = []
        self.done = 0

    def copied(self):
        return self.done + len(self.pending)

    def wait_copied(self, mark):
        while self.done < mark:
            self.pending.pop(0)()
            self.done += 1

    def synchronize(self):
        self.wait_copied(self.copied())

    def late(self, copy):
        def later(source, buffer):
            tensor = torch.full_like(source.weight, float("nan"))
            self.pending.append(lambda: tensor.copy_(copy(source, buffer)))
            return tensor

        return later


class Block(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        torch.manual_seed(index)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.requires_grad_(False)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Net(torch.nn.Module):
    """Blocks in the order that `runs` says."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(i) for i in range(NUM))

    def forward(self, x, runs=range(NUM)):
        for index in runs:
            x = self.blocks[index](x)
        return x


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def units(net):
    return [Unit(i, f"block/{i}", block) for i, block in enumerate(net.blocks)]


def all_behind(block):
    return set(range(block + 1, NUM)), True


def streamer(net, depth=1, lane=None):
    return Streamer(units(net), CPU, depth=depth, lane=lane or InOrderLane())


def clean(net):
    plain = all(isinstance(p, torch.nn.Parameter) for p in net.parameters())
    return plain and not any("forward" in block.__dict__ for block in net.blocks)


ORDERS = {
    "all": range(NUM),
    "skipped": (0, 3, 4),
    "last left out": (0, 1),
    "twice": (0, 1, 1, 2, 1),
    "backwards": (4, 2, 0),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3, NUM])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_and_depth(net, x, monkeypatch, order, depth, late):
    runs = ORDERS[order]
    wanted = net(x, runs)
    lane = LateLane() if late else InOrderLane()
    if late:
        monkeypatch.setattr(stream, "_copy", lane.late(stream._copy))
    driver = streamer(net, depth, lane)
    for _ in range(3):
        with driver.call(all_behind, None):
            assert net(x, runs).equal(wanted)
        assert clean(net)
    driver.close()


def test_a_missing_wait_is_seen(net, x, monkeypatch):
    """Negative control: without waiting for copies the late lane gives NaN."""
    lane = LateLane()
    monkeypatch.setattr(stream, "_copy", lane.late(stream._copy))
    monkeypatch.setattr(LateLane, "wait_copied", lambda self, mark: None)
    with streamer(net, 1, lane).call(all_behind, None):
        assert net(x).isnan().any()


def test_an_early_overwrite_is_seen(net, x):
    """Negative control: one buffer for two blocks gives other numbers."""
    driver = streamer(net)
    wanted = net(x)
    driver._free[1].buffer = driver._free[0].buffer
    with driver.call(all_behind, None):
        assert not net(x).equal(wanted)


def test_same_parameter_objects_come_back(net, x):
    before = dict(net.named_parameters())
    driver = streamer(net)
    with driver.call(all_behind, None):
        net(x)
    driver.close()
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert driver._staged == {}
    assert driver._free == []


def test_exception_in_a_block(net, x):
    wanted = net(x)
    driver = streamer(net)

    def fail(*args):
        raise RuntimeError("stop")

    net.blocks[2].forward = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), driver.call(all_behind, None):
            net(x)
        assert all(isinstance(p, torch.nn.Parameter) for p in net.parameters())
    assert net.blocks[2].__dict__.pop("forward") is fail
    assert clean(net)
    with driver.call(all_behind, None):
        assert net(x).equal(wanted)


def test_no_copy_for_blocks_that_a_cache_skips(net, x):
    """Front block computed, the rest undecided, then skipped: the front block is all that moves."""
    driver = streamer(net, depth=2)
    for decided in (({1, 2, 3, 4}, True), (set(), False), (set(), True)):
        with driver.call(lambda block, decided=decided: decided, None):
            net(x, (0, 1, 2, 3, 4) if decided[0] else (0,))
    # all five, wrapped round to 0 and 1; then 0 alone, twice
    assert driver.num_copies <= NUM + 2 + 2
    assert driver.num_skipped == 2 * (NUM - 1)


def test_next_call_starts_with_staged_blocks(net, x):
    driver = streamer(net)
    with driver.call(all_behind, None):
        net(x)
    assert sorted(driver._staged) == [0]
    with driver.call(all_behind, None):
        net(x)
    assert driver.num_copies == 2 * NUM + 1


def test_a_weight_that_was_replaced_meanwhile_stays(net, x):
    """ComfyUI loads a module between two calls, after its block was staged for the next one."""
    driver = streamer(net)
    with driver.call(all_behind, None):
        net(x)
    replaced = torch.nn.Parameter(net.blocks[0].first.weight * 2, requires_grad=False)
    net.blocks[0].first.weight = replaced
    wanted = net(x)
    with driver.call(all_behind, None):
        assert net(x).equal(wanted)
    assert net.blocks[0].first.weight is replaced


class Odd(torch.Tensor):
    """A tensor subclass that nobody knows."""


def test_unknown_tensor_types_are_left_to_comfyui(net):
    odd = net.blocks[0].first.weight.detach().as_subclass(Odd)
    net.blocks[0].first._parameters["weight"] = odd
    found = stream.find_sources(net.blocks[0])
    assert found.num_left == 1
    assert [source.name for source in found.weights] == ["bias", "weight", "bias"]


def test_buffers_hold_the_largest_block(net):
    driver = streamer(net, depth=2)
    size = sum(module_sizes(net.blocks[0]))
    assert 3 * size <= driver.staged_peak_bytes <= 3 * (size + 4 * 1024)
    assert driver.streamed_bytes == [driver.sources[0].size] * NUM


def test_parts_of_a_plain_weight_are_itself():
    weight = torch.nn.Parameter(torch.ones(2))
    ((name, part),), context = parts_of(weight)
    assert (name, context) == ("", None)
    assert part.data_ptr() == weight.data_ptr()


def test_hooks_call_what_they_found_and_give_it_back(net, x):
    calls = []

    def found(x):
        calls.append("found")
        return x

    net.blocks[1].forward = found
    around = recording(calls)
    with hooks(units(net), around):
        net(x, (0, 1))
    assert calls == [0, 1, "found"]
    assert net.blocks[1].__dict__["forward"] is found
    assert "forward" not in net.blocks[0].__dict__


def recording(calls):
    from contextlib import contextmanager

    @contextmanager
    def around(at):
        calls.append(at)
        yield

    return around


def test_times_of_every_unit(net, x):
    times = BlockTimes(DeviceClock(CPU))
    for _ in range(2):
        with BlockDriver(units(net)).call(all_behind, times):
            net(x, (0, 1, 2))
    read = times.read()
    assert times.num_calls == 2
    assert sorted(read) == [0, 1, 2]
    assert all(one.computing > 0 and one.waiting >= 0 for one in read.values())
