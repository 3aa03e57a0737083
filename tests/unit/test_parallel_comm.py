"""Collectives on forked ranks: uneven and empty parts, every dtype, closing frees a peer, ring."""

import os
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from slipstream.parallel.comm import NCCL_ENVIRONMENT, Clock, Group, TransportError, as_bytes
from slipstream.parallel.mesh import Layout
from slipstream.parallel.ring import merge, partial_attention
from slipstream.parallel.serve import Server

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool,
    torch.float8_e4m3fn,
]  # fmt: skip


def test_exchange_of_uneven_and_empty_parts_in_every_dtype():
    """Rank a sends a + b rows to rank b; rank 2 sends nothing to rank 0."""

    def rows(a, b):
        return 0 if (a, b) == (2, 0) else a + b

    def body(rank):
        group = rank.links(Layout(ulysses=3), "g").mesh.main
        me, seen = rank.number, []
        for dtype in DTYPES:
            parts = [torch.full((rows(me, b), 2), me * 3 + b).to(dtype) for b in range(3)]
            shapes = [(rows(a, me), 2) for a in range(3)]
            got = group.exchange(parts, shapes).wait()
            assert [t.dtype for t in got] == [dtype] * 3
            seen.append([t.float().tolist() for t in got])
        return seen

    for me, seen in enumerate(run_ranks(3, body)):
        for dtype, got in zip(DTYPES, seen, strict=True):
            values = [torch.tensor(float(a * 3 + me)).to(dtype).float() for a in range(3)]
            assert got == [[[v.item()] * 2] * rows(a, me) for a, v in enumerate(values)]


def test_exchange_with_nothing_for_some():
    def body(rank):
        group = rank.links(Layout(ulysses=2), "g").mesh.main
        parts = [None, torch.ones(3)] if rank.number == 0 else [torch.zeros(0), None]
        shapes = [None, (0,)] if rank.number == 0 else [(3,), None]
        return [t.tolist() for t in group.exchange(parts, shapes).wait()]

    assert run_ranks(2, body) == [[[], []], [[1.0] * 3, []]]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.5).expand(1),
        torch.tensor(0.5).expand(1, 1),
        torch.tensor(3, dtype=torch.int16),
        torch.arange(6.0).view(2, 3)[1:],
        torch.arange(6.0)[4:5],
        torch.zeros(0, 3),
    ],
    ids=["expanded", "expanded twice", "scalar", "row", "element", "empty"],
)
def test_bytes_of_a_tensor_are_its_memory(tensor):
    found = as_bytes(tensor)
    assert found.tolist() == list(tensor.numpy().tobytes())
    assert found.data_ptr() == tensor.data_ptr(), "receiving writes into it"


def test_gather_broadcast_send_and_bytes_counted():
    def body(rank):
        mesh = rank.links(Layout(ulysses=3), "g").mesh
        me = rank.number
        local = torch.full((1, me + 1, 2), float(me))
        everyone = mesh.gather(local, [1, 2, 3], 1, leader_only=False)
        leader = mesh.gather(local, [1, 2, 3], 1, leader_only=True)
        flag = torch.tensor([me], dtype=torch.uint8)
        mesh.main.broadcast(flag, root=2)
        if me == 0:
            mesh.main.send(torch.arange(4.0), to=1)
        got = torch.empty(4)
        if me == 1:
            mesh.main.recv(got, source=0)
        return {
            "everyone": everyone[0, :, 0].tolist(),
            "leader": None if leader is None else leader[0, :, 0].tolist(),
            "flag": flag.item(),
            "got": got.tolist() if me == 1 else None,
            "bytes": rank.clock.bytes_sent,
        }

    whole = [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    ranks = run_ranks(3, body)
    assert [r["everyone"] for r in ranks] == [whole] * 3
    assert [r["leader"] for r in ranks] == [whole, None, None]
    assert [r["flag"] for r in ranks] == [2, 2, 2]
    assert ranks[1]["got"] == [0.0, 1.0, 2.0, 3.0]
    assert ranks[0]["bytes"] == 2 * 8 + 16, "its rows to two ranks, and what it sent"


def test_hybrid_groups_hold_the_right_ranks():
    def body(rank):
        mesh = rank.links(Layout(ulysses=2, ring=2), "g").mesh
        mine = torch.tensor([float(rank.number)])
        heads = mesh.heads.exchange([mine] * 2, [(1,)] * 2).wait()
        keys = mesh.keys.exchange([mine] * 2, [(1,)] * 2).wait()
        return [t.item() for t in heads], [t.item() for t in keys], list(mesh.chunk)

    assert run_ranks(4, body) == [
        ([0, 1], [0, 2], [0, 1]),
        ([0, 1], [1, 3], [0, 1]),
        ([2, 3], [0, 2], [2, 3]),
        ([2, 3], [1, 3], [2, 3]),
    ]


@pytest.mark.parametrize("layout", [Layout(cfg=2, ulysses=2), Layout(batch=2, ulysses=2)])
def test_every_lane_but_the_first_has_a_relay_to_process_0(layout):
    def body(rank):
        links = rank.links(layout, "g")
        value = torch.tensor([rank.number * 10.0])
        if rank.number == 0:
            links.entry(1).broadcast(value, root=0)
            links.entry(1).recv(value, source=1)
        elif links.own_lane == 1:
            links.entry(1).broadcast(value, root=0)
            if links.layout.rank(rank.number) == 0:
                links.entry(1).send(value + 5, to=0)
        return value.item(), list(links.relays), links.mesh.rank

    assert run_ranks(4, body) == [(5, [1], 0), (10, [], 1), (0, [1], 0), (0, [1], 1)]


def test_a_lane_may_wait_longer_for_process_0_than_for_an_exchange():
    def body(rank):
        links = rank.links(Layout(batch=2), "g", timeout_s=0.5)
        value = torch.full((1 << 20,), rank.number + 1.0)
        if rank.number == 0:
            time.sleep(1.5)  # at its own rows
            links.entry(1).recv(value, source=1)
        else:
            links.entry(1).send(value, to=0, patience_s=60)
        return value[-1].item()

    assert run_ranks(2, body) == [2, 2]


@pytest.mark.parametrize("pending", [0, 2])
def test_closing_frees_a_blocked_peer_at_once(pending):
    """Also with exchanges under way whose frames a traceback may hold."""

    def body(rank):
        links = rank.links(Layout(ulysses=2), "g", timeout_s=15)
        group = links.mesh.main
        started = time.monotonic()
        if rank.number == 1:
            open_ones = [group.exchange([torch.ones(9)] * 2, [(9,)] * 2) for _ in range(pending)]
            time.sleep(0.3)
            links.close()
            assert len(open_ones) == pending
            with pytest.raises(TransportError):
                group.exchange([torch.ones(1)] * 2, [(1,)] * 2)
            time.sleep(1)
            return None
        for _ in range(pending):
            group.exchange([torch.ones(9)] * 2, [(9,)] * 2).wait()
        with pytest.raises(TransportError):
            group.exchange([torch.ones(9)] * 2, [(9,)] * 2).wait()
        return time.monotonic() - started

    assert run_ranks(2, body)[0] < 2


def test_a_silent_peer_is_a_transport_error_after_the_timeout():
    def body(rank):
        links = rank.links(Layout(ulysses=2), "g", timeout_s=0.5)
        if rank.number == 1:
            time.sleep(1.5)
            return None
        started = time.monotonic()
        with pytest.raises(TransportError):
            links.mesh.main.exchange([torch.ones(1)] * 2, [(1,)] * 2).wait()
        return time.monotonic() - started

    assert 0.3 < run_ranks(2, body)[0] < 1.4


class Event:
    """A CUDA event on a device that has done everything but the last `behind` events."""

    num_made, behind = 0, 4

    def __init__(self, enable_timing=False):
        Event.num_made += 1
        self.number, self.is_waited_for = Event.num_made, False

    def record(self):
        pass

    def query(self):
        return self.is_waited_for or self.number <= Event.num_made - self.behind

    def synchronize(self):
        self.is_waited_for = True

    def elapsed_time(self, end):
        return 2.0


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "num_made", 0)


def test_events_of_ten_thousand_exchanges_are_folded(events):
    clock = Clock(torch.device("cuda:0"))
    for _ in range(10_000):
        with clock.measure("exchange"):
            pass
    assert len(clock._events) < 1000
    assert clock.seconds()["exchange"] == pytest.approx(20.0)
    assert len(clock._events) == 0


def test_a_worker_makes_no_events(events):
    """Nobody there reads the seconds."""
    server = Server(None, None, torch.device("cuda:0"), 0)
    for _ in range(10_000):
        with server.clock.measure("exchange"):
            pass
    assert Event.num_made == 0


def test_torch_never_ends_the_process_for_a_slow_collective(monkeypatch):
    """The group is built with the watchdog's ways to end the process switched off."""
    seen = {}

    def build(store, rank, world, options):
        seen.update({name: os.environ.get(name) for name in NCCL_ENVIRONMENT})
        seen["timeout"] = options._timeout

    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", build, raising=False)
    build.Options = types.SimpleNamespace
    Group(
        dist.HashStore(), "g", rank=0, world=2, backend="nccl", timeout_s=60,
        clock=Clock(torch.device("cpu")),
    )  # fmt: skip
    assert seen.pop("timeout") >= timedelta(days=1)
    assert seen == dict.fromkeys(NCCL_ENVIRONMENT, "0")
    assert {"TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_DUMP_ON_TIMEOUT"} <= set(seen)
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1", "as the user had it"
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ


class OnGpu:
    """A tensor whose address the CPU must not read."""

    device, dtype, shape, nbytes = torch.device("cuda:0"), torch.float32, (4,), 16

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values.clone()

    def copy_(self, other):
        self.values = other.clone()


def test_gloo_sends_and_receives_what_lives_on_a_gpu():
    """Its send and recv take addresses, which must be the CPU's (Windows; cuda:0 with cpu)."""

    def body(rank):
        group = rank.links(Layout(ulysses=2), "g").mesh.main
        if rank.number == 0:
            group.send(OnGpu(torch.arange(4.0)), to=1)
            return None
        found = OnGpu(torch.zeros(4))
        group.recv(found, source=0)
        return found.values.tolist()

    assert run_ranks(2, body)[1] == [0.0, 1.0, 2.0, 3.0]


def test_clock_adds_up():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.measure("exchange"):
            time.sleep(0.01)
    assert 0.02 <= clock.seconds()["exchange"] < 0.2
    assert clock.seconds() == clock.seconds()


# --- log-sum-exp


def qkv(num_queries=5, num_keys=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, 8, generator=generator) for n in (num_queries, num_keys, num_keys)]


def test_merging_parts_of_the_keys_is_attention_over_all():
    q, k, v = qkv()
    mask = torch.zeros(5, 9)
    mask[:, :4] = float("-inf")  # the first part has no key for anybody
    mask[2, 6:] = float("-inf")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = lse = None
    for part in (slice(0, 4), slice(4, 4), slice(4, 6), slice(6, 9)):
        found = partial_attention(q, k[:, :, part], v[:, :, part], mask=mask[..., part])
        out, lse = merge(out, lse, *found)
    assert (out - expected).abs().max() < 1e-6


def test_partial_attention_gives_the_log_sum_exp():
    q, k, v = qkv()
    keep = torch.ones(5, 9, dtype=torch.bool)
    keep[:, 3] = False
    out, lse = partial_attention(q, k, v, mask=keep, scale=0.3)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~keep, float("-inf"))
    assert (lse - torch.logsumexp(scores, -1)).abs().max() < 1e-5
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)
    assert (out - expected).abs().max() < 1e-6


def test_rows_without_any_key_are_zero():
    q, k, v = qkv()
    out, lse = partial_attention(q, k, v, mask=torch.zeros(5, 9, dtype=torch.bool))
    merged, _ = merge(None, None, out, lse)
    assert torch.equal(merged, torch.zeros_like(merged))
