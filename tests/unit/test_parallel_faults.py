"""What goes wrong between processes, and the one sentence that the node shows for it."""

import atexit
import os

import pytest
import torch
from parallel_session import PROGRAM, Session, close, fails, pids
from slipstream.backends import worker_host
from slipstream.parallel import worker
from slipstream.parallel.comm import TransportError
from slipstream.parallel.launcher import LocalLauncher, StartFailed
from slipstream.parallel.messages import Load
from slipstream.parallel.pool import Pool
from slipstream.parallel.wire import encode
from slipstream.parallel.workers import WorkerError, recover

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and /proc")


def test_noise_of_the_transport_becomes_a_sentence():
    error = TransportError("[unbound_buffer.cc:129] Timed out waiting 2000ms")
    cause, lost = recover([], error, grace_s=1, timeout_s=2)
    assert isinstance(cause, WorkerError)
    assert str(cause).startswith("The processes did not finish an exchange within 2 s: raise")
    assert lost == []


def test_a_loader_argument_that_is_a_device_is_the_workers_own(monkeypatch):
    seen = []
    monkeypatch.setattr(worker_host, "load", lambda recipe, package: seen.append(recipe))
    monkeypatch.setattr(worker_host, "weights_print", lambda patcher, names: {})
    monkeypatch.setattr(worker_host, "peak_bytes", lambda device: None)
    options = {"load_device": torch.device("cuda:1"), "offload_device": torch.device("cpu")}
    arguments = encode(("model.safetensors", options), [], "a loader argument")
    models = worker.LoadedModels(torch.device("cuda:0"))
    models.load(Load("key", "comfy.sd", "load_diffusion_model", arguments, None, {}))
    _, given = seen[0].arguments
    assert given == {"load_device": torch.device("cuda:0"), "offload_device": torch.device("cpu")}


class Refusing(LocalLauncher):
    """Nothing starts: no room on the GPU, or a torch that imports for minutes."""

    def start(self, specs, *, meanwhile=None):
        raise StartFailed("A worker ended with code 1. Last log lines:\nout of memory")


def test_automatic_settings_go_on_without_workers_that_do_not_start():
    pool = Pool(lambda: Refusing(PROGRAM))
    try:
        named = Session(pool, 2)
        error, _ = fails(named)
        assert isinstance(error, StartFailed)
        automatic = Session(pool, 2)
        automatic.state.config = type(automatic.config)(timeout_s=2, cfg=1)
        for _ in range(2):
            assert close(automatic.call(), automatic.expected())
        found = automatic.state.section().json
        assert (found["calls_distributed"], found["calls_local"]) == (0, 2)
        (note,) = automatic.run.notes
        assert "could not start its workers, so one device does it all" in note
        assert "out of memory" in note
    finally:
        pool.close()


def test_groups_end_before_the_interpreter(monkeypatch):
    """At exit the pool closes its groups first: NCCL's must not outlive CUDA."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", lambda f: at_exit.remove(f) if f in at_exit else None)
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    session = Session(pool, 2)
    session.call()
    (close_at_exit,) = at_exit
    before = pids(pool)
    assert pool._links
    close_at_exit()
    assert not pool._links
    assert not pool.workers
    assert before
    assert at_exit == []
