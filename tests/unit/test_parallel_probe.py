"""Two throw-away processes exchange before ComfyUI's process does; what their failure leads to."""

import os
import time

import pytest
import torch
from slipstream.parallel import probe
from slipstream.parallel.comm import TransportError
from slipstream.parallel.launcher import LocalLauncher
from slipstream.parallel.pool import Pool
from slipstream.parallel.probe import LinkCheck, Result, exchange

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo over a FileStore")


def test_two_processes_exchange_over_gloo():
    found = exchange(("cpu", "cpu"), "gloo")
    assert found.failure == ""
    assert found.bytes_per_s > 1e6


def test_an_exchange_that_hangs_ends_with_its_processes(monkeypatch, tmp_path):
    """A program that meets the other one and then waits for ever, as a kernel that spins."""
    program = tmp_path / "hanging.py"
    program.write_text("import time\ntime.sleep(100)")
    monkeypatch.setattr(probe, "PROGRAM", program)
    monkeypatch.setattr(probe, "_START_S", 1)
    started = time.monotonic()
    found = exchange(("cpu", "cpu"), "gloo", limit_s=1)
    assert "no end after 2 s" in found.failure
    assert time.monotonic() - started < 20


def test_a_device_that_is_not_there_is_the_reason():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert exchange(("cuda:0", "cuda:1"), "nccl", limit_s=5).failure


@pytest.fixture
def board(monkeypatch):
    """GPUs whose exchange works under an environment only; `tried`: with which it was tried."""
    monkeypatch.setattr(probe, "_key", lambda devices: "two cards")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)

    class Board:
        tried, needs = [], {}

    def exchanged(devices, backend, *, environment):
        Board.tried.append(dict(environment))
        return Result(1e9) if Board.needs.items() <= environment.items() else Result(failure="hung")

    Board.tried.clear()
    monkeypatch.setattr(probe, "exchange", exchanged)
    return Board


def test_good_links_are_tried_once_for_all_starts(board, tmp_path):
    board.needs = {}
    for _ in range(2):
        assert LinkCheck(tmp_path).environment(("cuda:0", "cuda:1")) == ({}, "")
    assert len(board.tried) == 1


def test_peer_to_peer_that_hangs_is_switched_off_and_told(board, tmp_path):
    board.needs = {"NCCL_P2P_DISABLE": "1"}
    for _ in range(2):
        environment, sentence = LinkCheck(tmp_path).environment(("cuda:0", "cuda:1"))
        assert environment == {"NCCL_P2P_DISABLE": "1"}
        assert "hang in peer-to-peer copies" in sentence
    assert len(board.tried) == 2


def test_links_that_never_work_are_an_error_that_is_tried_again(board, tmp_path):
    board.needs = {"no": "such thing"}
    for _ in range(2):
        with pytest.raises(TransportError, match=r"could not exchange 2 MB in 20 s .*IOMMU"):
            LinkCheck(tmp_path).environment(("cuda:0", "cuda:1"))
    assert len(board.tried) == 4


def test_the_pool_asks_before_it_starts_anything(monkeypatch):
    """The answer must be in the environment that new workers inherit."""
    monkeypatch.setattr(Pool, "_backend_of", lambda self, devices: "nccl")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    asked = []

    def check(devices):
        asked.append(tuple(devices))
        return {"NCCL_P2P_DISABLE": "1"}, "told"

    pool = Pool(lambda: LocalLauncher(probe.PROGRAM), check_links=check)
    for _ in range(2):
        pool._check(("cuda:0", "cuda:1", "cuda:2"))
    assert asked == [("cuda:0", "cuda:1")]
    assert os.environ["NCCL_P2P_DISABLE"] == "1"
