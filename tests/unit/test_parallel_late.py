"""Shared calls over groups with NCCL's semantics (tests/late_group.py): every fault ends in time.

Each within timeout_s + 2 s, with the workers alive and one sentence, and the next call is right.
"""

import os
import threading
import time

import late_group
import pytest
import torch
from parallel_session import PROGRAM, TIMEOUT_S, Session, close, exists, fails, pids
from patience import patience
from slipstream.parallel import comm
from slipstream.parallel import pool as pool_module
from slipstream.parallel.distribute import Distributor
from slipstream.parallel.launcher import LocalLauncher
from slipstream.parallel.pool import Pool
from slipstream.parallel.workers import WorkerError, WorkerOutOfMemory

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and /proc")
IN_TIME_S = TIMEOUT_S + 2


class Interrupted(Exception):  # noqa: N818
    """What ComfyUI raises for a Cancel."""


@pytest.fixture
def late(monkeypatch):
    """A pool whose groups have NCCL's semantics; `stream` is what this process's device does."""
    monkeypatch.setattr(Pool, "_backend_of", lambda self, devices: "nccl")
    monkeypatch.setitem(pool_module._PROBE_BYTES, "nccl", 1 << 16)  # it goes over gloo
    late_group.asked(monkeypatch)
    cancelled = threading.Event()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(lambda: LocalLauncher(PROGRAM), is_cancelled=cancelled.is_set)
    pool.stream = late_group.install(comm, monkeypatch.setattr)
    pool.cancelled = cancelled
    yield pool
    pool.close()
    torch.set_num_threads(threads)


def is_good(session):
    found = close(session.call(), session.expected())
    session.state.settle()
    return found


def test_good_calls(late):
    session = Session(late, 3)
    for _ in range(3):
        assert is_good(session)
    assert session.state.section().json["calls_distributed"] == 3
    assert late._watch._thread is None or not late._watch._calls


def test_a_worker_that_raises_frees_everybody_at_once(late):
    """The others are inside an exchange, this process at its next need of the device."""
    session = Session(late, 3)
    assert is_good(session)
    kept = pids(late)
    error, seconds = fails(session, fault=("raise", late.workers[1].handle.number))
    assert "Worker 2 (cpu) failed: RuntimeError: injected failure" in str(error)
    assert seconds < IN_TIME_S * patience()
    assert pids(late) == kept
    assert is_good(session)


def test_a_worker_without_memory_is_one_for_comfyui_too(late):
    session = Session(late, 3)
    assert is_good(session)
    kept = pids(late)
    error, _ = fails(session, fault=("memory", late.workers[0].handle.number))
    assert isinstance(error, WorkerOutOfMemory)
    assert isinstance(error, torch.OutOfMemoryError), "ComfyUI then clears memory"
    assert "Worker 1 (cpu) has no memory left" in str(error)
    assert pids(late) == kept
    assert is_good(session)


def test_cancel_between_two_layers(late):
    """This process raises; the workers wait for it in an exchange that nobody will join."""
    session = Session(late, 3)
    assert is_good(session)
    kept = pids(late)
    error, seconds = fails(session, fault=("raise", 0))
    assert str(error) == "injected failure in process 0"
    assert seconds < 2 * patience()
    assert pids(late) == kept
    assert is_good(session)


def test_cancel_while_this_process_is_stuck(late):
    """It waits for its device, which waits for a worker that does not come: no layer can raise."""
    session = Session(late, 3)
    assert is_good(session)

    def meanwhile():
        if late.cancelled.is_set():
            late.cancelled.clear()
            raise Interrupted

    object.__setattr__(session.state.shared, "meanwhile", meanwhile)
    object.__setattr__(session.state, "config", type(session.config)(
        devices="cpu,cpu,cpu", timeout_s=60, cfg=1))  # fmt: skip
    threading.Timer(0.5, late.cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        session.call(fault=("hang a while", late.workers[0].handle.number))
    assert time.monotonic() - started < 8 * patience()
    assert all(exists(pid) for pid in pids(late))
    assert is_good(session)


def test_a_peer_that_hangs_on_its_device(late):
    """It has answered, and its device never comes to the end: nothing here raises by itself."""
    session = Session(late, 2)
    assert is_good(session)
    kept = pids(late)
    started = time.monotonic()
    session.call(fault=("hang on the device", late.workers[0].handle.number))
    late.stream.synchronize()  # what the sampler does next
    with pytest.raises(WorkerError, match="did not finish an exchange within 2 s"):
        session.state.settle()
    assert time.monotonic() - started < (IN_TIME_S + 2) * patience()
    assert pids(late) == kept
    assert is_good(session)


def test_the_next_call_says_what_became_of_the_one_before(late):
    session = Session(late, 2)
    assert is_good(session)
    session.call(fault=("hang on the device", late.workers[0].handle.number))
    late.stream.synchronize()
    error, _ = fails(session)
    assert "did not finish an exchange within 2 s" in str(error)
    assert is_good(session)


def test_a_hang_in_the_first_exchange(late, monkeypatch):
    """The commonest failure of consumer boards: the groups are made, and the first bytes hang."""
    session = Session(late, 2)
    monkeypatch.setenv("SLIPSTREAM_TEST_NO_MEASURE", "1")
    error, seconds = fails(session)
    assert "did not finish an exchange within 2 s" in str(error)
    assert seconds < (IN_TIME_S + 4) * patience(), "and the time to start a worker"
    assert len(late.workers) == 1
    late.close()
    monkeypatch.delenv("SLIPSTREAM_TEST_NO_MEASURE")
    assert is_good(Session(late, 2))


def test_loading_may_take_longer_than_an_exchange(late, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_TEST_BEGIN_S", str(2.5 * TIMEOUT_S))
    session = Session(late, 2)
    session.state.begin_workers((1, 11, 24))
    started = time.monotonic()
    session.state.begin_workers((1, 11, 24))
    assert time.monotonic() - started < 1, "nobody waits for it here"
    assert is_good(session)
    assert session.state.section().json["calls_distributed"] == 1


def test_a_worker_killed_in_a_call(late):
    session = Session(late, 3)
    assert is_good(session)
    error, seconds = fails(session, fault=("exit", late.workers[1].handle.number))
    assert "Worker 2 (cpu) ended with code 7." in str(error)
    assert seconds < IN_TIME_S * patience()
    assert is_good(session)


# --- lanes: rows of a batch, which exchange nothing


def lanes(late, world):
    return Session(late, world, batch=0)


def is_good_batch(session, rows=4):
    x = torch.randn(rows, 11, 24, generator=torch.Generator().manual_seed(rows))
    found = close(session.call(x), session.expected(x))
    session.state.settle()
    return found


@pytest.mark.parametrize("kind", ["raise", "memory"])
def test_a_fault_in_a_lane(late, kind, monkeypatch):
    monkeypatch.setattr(Distributor, "_measured", lambda *_: None)  # every lane always has rows
    session = lanes(late, 3)
    assert is_good_batch(session)
    kept = pids(late)
    for worker in late.workers:
        error, seconds = fails(session, x=torch.ones(4, 11, 24), fault=(kind, worker.handle.number))
        assert isinstance(error, WorkerOutOfMemory if kind == "memory" else WorkerError)
        assert f"{worker} " in str(error)
        assert seconds < IN_TIME_S * patience()
        assert is_good_batch(session)
    assert pids(late) == kept


def test_a_lane_killed_in_a_call(late):
    session = lanes(late, 2)
    assert is_good_batch(session)
    error, seconds = fails(
        session, x=torch.ones(2, 11, 24), fault=("exit", late.workers[0].handle.number)
    )
    assert "Worker 1 (cpu) ended with code 7." in str(error)
    assert seconds < IN_TIME_S * patience()
    assert is_good_batch(session)


def test_a_cancel_while_other_lanes_compute(late):
    session = lanes(late, 3)
    assert is_good_batch(session)
    kept = pids(late)
    error, seconds = fails(session, x=torch.ones(4, 11, 24), fault=("raise", 0))
    assert str(error) == "injected failure in process 0"
    assert seconds < 2 * patience()
    assert pids(late) == kept
    assert is_good_batch(session)
