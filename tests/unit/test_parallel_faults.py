"""What goes wrong between processes, and the one sentence that the node shows for it."""

import atexit
import gc
import os
import sys
import threading
import types
from pathlib import Path

import fake_net
import pytest
import torch
from forked_ranks import run_ranks
from parallel_session import PROGRAM, Session, close, fails, pids
from slipstream.backends import worker_host
from slipstream.parallel import worker
from slipstream.parallel.comm import TransportError
from slipstream.parallel.launcher import LocalLauncher, StartFailed
from slipstream.parallel.mesh import Layout
from slipstream.parallel.messages import Load
from slipstream.parallel.pool import Pool
from slipstream.parallel.report import Counts, section
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
    monkeypatch.setattr(worker.LoadedModels, "facts", lambda self: {})
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


def test_ten_thousand_exchanges_leave_nothing_behind():
    def body(rank):
        group = rank.links(Layout(ulysses=2), "g").mesh.main
        one = torch.ones(8)

        def exchange(count):
            for _ in range(count):
                group.exchange([one] * 2, [(8,)] * 2).wait()
            return (
                len(list(Path("/proc/self/fd").iterdir())), threading.active_count(),
                len(group.works), sum(type(o).__name__ == "Work" for o in gc.get_objects()),
            )  # fmt: skip

        return exchange(100), exchange(10_000)

    for before, after in run_ranks(2, body, timeout_s=120):
        assert after == before


def test_warnings_of_workers_reach_comfyuis_log(caplog):
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    try:
        session = Session(pool, 2)
        session.call(fault=("warn", pool_number(pool)))
        with caplog.at_level("WARNING", "slipstream"):
            pool.end_run()
        assert "worker 1: the moon is full" in caplog.text
        caplog.clear()
        pool.end_run()
        assert "the moon" not in caplog.text
        assert "is up" not in caplog.text, "what is no warning stays in the file"
    finally:
        pool.close()


def pool_number(pool):
    """The number that the pool's next worker will have for its launcher."""
    return 1 if not pool.workers else pool.workers[0].handle.number


def test_the_report_has_the_workers_memory():
    facts = [{"device_bytes": 3 << 30, "private_bytes": 7, "models": 1}]
    found = section(Counts(workers=2, shared=4, memory=facts))
    assert found.json["worker_device_bytes"] == [3 << 30]
    assert found.json["worker_private_bytes"] == [7]
    assert "peak of the workers' devices: 3.0 GiB" in found.lines


def test_models_on_a_workers_device_are_parked_where_comfyui_needs_it():
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    try:
        session = Session(pool, 2)
        session.call()
        object.__setattr__(session.state.shared, "busy_devices", lambda: ["cpu"])
        sent = []
        for worker in pool.workers:
            send = worker.send

            def record(message, tensors=(), send=send):
                sent.append(message)
                send(message, tensors)

            worker.send = record
        session.state.section()
        session.state.close()
        assert [type(m).__name__ for m in sent] == ["EndRun", "Park"]
    finally:
        pool.close()


def test_dynamic_vram_begins_in_a_worker_as_in_comfyui(monkeypatch):
    """The options of three protocols of comfy-aimdo, newest first (main.py of 0.33)."""

    class Args:
        reserve_vram, disable_nvml_pressure = 2.0, False

    def control(*names):
        def init(**options):
            if set(options) - set(names):
                raise TypeError("unexpected keyword")
            seen.append(options)

        found = types.ModuleType("comfy_aimdo.control")
        found.init = init
        package = types.ModuleType("comfy_aimdo")
        package.control = found
        monkeypatch.setitem(sys.modules, "comfy_aimdo", package)
        monkeypatch.setitem(sys.modules, "comfy_aimdo.control", found)

    seen = []
    for names in (("simple_vram_headroom", "nvml_pressure"), ("simple_vram_headroom",), ()):
        control(*names)
        worker_host._init_aimdo(Args)
    assert seen == [
        {"simple_vram_headroom": 2 << 30, "nvml_pressure": True},
        {"simple_vram_headroom": 2 << 30},
        {},
    ]


def test_a_call_that_stays_here_says_so_on_the_node_once():
    """An attention override of another pack keeps every call on one device."""
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    try:
        session, told = Session(pool, 2), []
        object.__setattr__(session.state.shared, "tell", told.append)
        for _ in range(3):
            session.call(optimized_attention_override=fake_net.attention_override())
        assert told == [
            "On one device: an attention override cannot travel: use SlipstreamAttention instead"
        ]
    finally:
        pool.close()


def test_room_for_communicators_is_asked_for_before_they_are_made(monkeypatch):
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    assert pool.groups_bytes(("cpu", "cpu")) == 0
    monkeypatch.setattr(Pool, "_backend_of", lambda self, devices: "nccl")
    assert pool.groups_bytes(("cuda:0", "cuda:1")) == 900 << 20
    pool._links[None] = object()
    assert pool.groups_bytes(("cuda:0", "cuda:1")) == 0
