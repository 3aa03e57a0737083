"""Worker processes: shared calls, every fault, models kept and dropped, life and death.

The workers run the pack's own message loop without ComfyUI (tests/fake_worker.py).
"""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client
from pathlib import Path

import comfy_home
import fake_net
import fake_worker
import pytest
import torch
from parallel_session import PROGRAM, TIMEOUT_S, Session, close, exists, fails, pids
from patience import patience
from slipstream.backends.calls import BranchKey, ModelCall
from slipstream.parallel import run_state
from slipstream.parallel.channel import Channel
from slipstream.parallel.config import SequenceParallelConfig
from slipstream.parallel.launcher import LocalLauncher, Spec, StartFailed, worker_environment
from slipstream.parallel.messages import Done, Ping, to_bytes
from slipstream.parallel.pool import Pool
from slipstream.parallel.route import Baton, run_both
from slipstream.parallel.serve import Server
from slipstream.parallel.shared import BeginAgain
from slipstream.parallel.workers import WorkerError, ask

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and /proc")


@pytest.fixture(scope="module")
def pool():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers: several wait for each other on a busy machine
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    yield pool
    pool.close()
    torch.set_num_threads(threads)


def test_calls_are_shared_and_counted(pool):
    session = Session(pool)
    for _ in range(3):
        assert close(session.call(), session.expected())
    found = session.state.section().json
    assert (found["workers"], found["calls_distributed"], found["calls_local"]) == (3, 3, 0)
    assert found["ulysses"] == 3
    assert found["bytes_exchanged"] > 0
    assert set(found["seconds"]) == {"compute", "exchange", "broadcast"}
    assert min(found["seconds"].values()) > 0
    assert found["reasons"] == {}
    assert (found["ring"], found["cfg"]) == (1, 1)


def test_a_call_costs_little_beside_its_tokens(pool, monkeypatch):
    """2 % of a step of half a second: the processor time of all that rank 0 does in one call."""
    session = Session(pool, 4)
    session.call()
    sizes, seconds = [], []
    for worker in pool.workers:

        def send(message, tensors=(), pass_on=worker.send):
            sizes.append(len(to_bytes(message, tensors)))
            pass_on(message, tensors)

        monkeypatch.setattr(worker, "send", send)
    for _ in range(20):
        started = time.thread_time()
        session.call()
        seconds.append(time.thread_time() - started)
    assert len(sizes) == 20 * 3
    assert max(sizes) < 2000
    assert min(seconds) < 0.010 * patience()


def test_layouts_change_without_new_processes(pool):
    before = Session(pool)
    before.call()
    kept = pids(pool)
    for fields in ({"ring": 3}, {"ulysses": 3}):
        session = Session(pool, **fields)
        assert close(session.call(), session.expected())
    assert pids(pool) == kept


def test_a_call_that_cannot_travel_runs_here(pool):
    session = Session(pool)
    assert close(session.call(patches={"attn1_patch": [object()]}), session.expected())
    assert close(session.call(optimized_attention_override=fake_net.attention_override()),
                 session.expected())  # fmt: skip
    found = session.state.section().json
    assert found["calls_local"] == 2
    assert list(found["reasons"]) == [
        "patches of the model's blocks (attn1_patch) cannot travel",
        "an attention override cannot travel: use SlipstreamAttention instead",
    ]


def test_one_device_is_used_where_it_is_faster(pool, monkeypatch):
    """Only if nobody asked for workers: then the sentence alone is in the report."""
    monkeypatch.setattr(run_state, "advice", lambda measured, layout: "One device would be faster")
    explicit = Session(pool)
    for _ in range(4):
        explicit.call()
    assert explicit.state.section().json["calls_local"] == 0
    assert "One device would be faster" in explicit.run.notes
    auto = Session(pool)
    auto.state.config = SequenceParallelConfig(timeout_s=TIMEOUT_S, cfg=1)
    for _ in range(4):
        assert close(auto.call(), auto.expected())
    found = auto.state.section().json
    assert (found["calls_distributed"], found["calls_local"]) == (2, 2)
    assert "workers=0 uses one device from here on" in next(iter(found["reasons"]))


# --- faults: what is raised, how fast, and a good call afterwards


def test_an_exception_in_a_worker_reaches_the_node(pool):
    session = Session(pool)
    session.call()
    kept = pids(pool)
    error, seconds = fails(session, fault=("raise", 2))
    assert isinstance(error, WorkerError)
    assert "Worker 2 (cpu) failed: RuntimeError: injected failure in process 2" in str(error)
    assert "break_down" in str(error), "the worker's own traceback"
    assert seconds < 2 * patience()
    assert pids(pool) == kept
    assert close(session.call(), session.expected())


def test_an_exception_here_is_raised_as_it_is(pool):
    session = Session(pool)
    session.call()
    kept = pids(pool)
    error, seconds = fails(session, fault=("raise", 0))
    assert type(error) is RuntimeError
    assert str(error) == "injected failure in process 0"
    assert seconds < 2 * patience()
    assert pids(pool) == kept
    assert close(session.call(), session.expected())


def test_a_misfit_of_the_plan_falls_back_to_one_device(pool):
    for where in (0, 1):
        session = Session(pool)
        session.call()
        assert close(session.call(fault=("plan", where)), session.expected())
        assert close(session.call(), session.expected())
        found = session.state.section().json
        assert found["reasons"] == {"injected misfit": 2}
        assert "injected misfit" in session.run.notes


def test_a_killed_worker_is_named_and_replaced(pool):
    session = Session(pool)
    session.call()
    victim = pool.workers[0]
    killed_at = []

    def kill():
        os.kill(victim.handle.pid, signal.SIGKILL)
        killed_at.append(time.monotonic())

    threading.Timer(0.1, kill).start()
    x = torch.zeros(1, 3000, 24)

    def call_until_it_fails():
        while time.monotonic() - (killed_at or [time.monotonic()])[0] < 9:
            session.call(x)

    with pytest.raises(WorkerError) as caught:
        call_until_it_fails()
    assert "Worker 1 (cpu) ended with code -9 (often out of memory)" in str(caught.value)
    assert "The next prompt starts a new one." in str(caught.value)
    assert "fake worker" in str(caught.value), "the end of its log"
    assert time.monotonic() - killed_at[0] < 2 * patience()
    assert not exists(victim.handle.pid)
    assert close(session.call(), session.expected())
    assert len(pids(pool)) == 2


def test_new_workers_do_not_reuse_what_the_old_ones_had(pool):
    """A block cache decides before a call; the worker that had the results is gone since."""
    session = Session(pool)
    decide = session.state.decisions.decide

    def decided(reuse):
        call = ModelCall(session.index + 1, 0, 0, BranchKey((), 0, None), (0,), num_ranks=3)
        return decide(call, reuse)

    assert not decided(True), "nothing has been computed yet"
    session.call()
    assert decided(True)
    session.call()
    assert decided(True)
    pool.workers[0].handle._process.kill()
    pool.workers[0].handle._process.wait()
    with pytest.raises(BeginAgain):
        session.call()
    found = session.state.section().json
    assert (found["calls_distributed"], found["calls_local"]) == (2, 0)
    assert not decided(True)
    assert close(session.call(), session.expected())
    assert session.state.section().json["calls_distributed"] == 3


def test_a_worker_that_ends_in_a_call(pool):
    session = Session(pool)
    session.call()
    number = int(pool.workers[1].handle.number)
    error, seconds = fails(session, fault=("exit", number))
    assert "Worker 2 (cpu) ended with code 7." in str(error)
    assert seconds < 3 * patience()
    assert close(session.call(), session.expected())


@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_worker_that_does_not_answer_is_killed(pool, kind):
    session = Session(pool)
    session.call()
    victim = pool.workers[0].handle
    error, seconds = fails(session, fault=(kind, victim.number))
    assert "Worker 1 (cpu) did not answer for 2 s: raise timeout_s" in str(error)
    assert TIMEOUT_S - 1 < seconds < (2 * TIMEOUT_S + 2) * patience()
    assert not exists(victim.pid)
    assert close(session.call(), session.expected())


# --- models


def test_several_models_stay_and_patches_follow(pool):
    bias = torch.arange(24.0)
    patched = Session(
        pool, seed=1, patches={"head.bias": [(1.0, ("diff", (bias,)), 1.0, None, None)]}
    )
    for _ in range(2):
        for session in (Session(pool, seed=0), Session(pool, seed=1)):
            assert close(session.call(), session.expected())
    patched.net.head.bias.data += bias
    assert close(patched.call(), patched.expected())
    assert {"seed 0", "seed 1"} <= set(pool.workers[0].models)


def test_the_least_recently_used_model_goes(pool):
    for seed in range(6):
        Session(pool, seed=seed).call()
    assert list(pool.workers[0].models) == ["seed 2", "seed 3", "seed 4", "seed 5"]
    facts = ask(pool.workers, Ping(), timeout_s=5)
    assert [f["models"] for f in facts] == [4, 4]


def test_unloading_reaches_the_workers(pool):
    Session(pool, seed=3).call()
    pool.unload("seed 3")
    assert "seed 3" not in pool.workers[0].models
    session = Session(pool, seed=3)
    assert close(session.call(), session.expected())


def test_wrong_patches_are_noticed(pool):
    session = Session(pool, seed=9)
    object.__setattr__(session.state.shared.model, "patches", lambda: (["dict"], [], "other"))
    with pytest.raises(WorkerError, match="did not get the model's patches"):
        session.call()


# --- two branches


def both(session, *, fault=None, fault_branch=1):
    """Branch 0 here, branch 1 by the workers; like apply.calc_cond_batch."""
    state = session.state
    baton = Baton()
    state.pair = state.choose(1, 2), baton
    inputs = [torch.full((1, 11, 24), 0.1), torch.full((1, 7, 24), 0.2)]

    def branch(number):
        return session.call(inputs[number], branch=number,
                            fault=fault if number == fault_branch else None)  # fmt: skip

    stopped = []
    try:
        with state.recovered(), torch.inference_mode():
            found = run_both(baton, lambda: branch(0), lambda: branch(1),
                             device=torch.device("cpu"), stop_first=stopped.append)  # fmt: skip
    finally:
        state.pair = None
    return found, [session.expected(x) for x in inputs], stopped


def cfg_session(pool, world):
    session = Session(pool, world)
    object.__setattr__(session.state, "config", SequenceParallelConfig(
        devices=",".join(["cpu"] * world), timeout_s=TIMEOUT_S, cfg=2))  # fmt: skip
    return session


@pytest.mark.parametrize("world", [2, 4])
def test_two_branches_at_once(pool, world):
    session = cfg_session(pool, world)
    for _ in range(2):
        found, expected, stopped = both(session)
        assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        assert stopped == []
    assert session.state.section().json["cfg"] == 2
    assert session.state.section().json["calls_distributed"] == 4


@pytest.mark.parametrize("world", [2, 4])
def test_a_fault_in_either_branch_is_the_one_raised(pool, world):
    session = cfg_session(pool, world)
    both(session)
    leader = pool.workers[world // 2 - 1].handle.number
    with pytest.raises(WorkerError, match="injected failure in process"):
        both(session, fault=("raise", leader))
    found, expected, _ = both(session)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="injected failure in process 0"):
        both(session, fault=("raise", 0), fault_branch=0)
    found, expected, _ = both(session)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


# --- life and death


def test_a_hundred_calls_leave_nothing_behind(pool):
    session = Session(pool)

    def counts():
        own = len(list(Path("/proc/self/fd").iterdir()))
        theirs = [len(list(Path(f"/proc/{p}/fd").iterdir())) for p in pids(pool)]
        return own, theirs, threading.active_count(), pids(pool)

    for _ in range(5):
        session.call()
    before = counts()
    for _ in range(100):
        session.call()
        session.state.decisions.failed()
    assert counts() == before


def test_idle_workers_end_and_come_back():
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    try:
        idle_s = 1.5 * patience()
        session = Session(pool, 2, idle_s=idle_s)
        session.call()
        (pid,) = pids(pool)
        deadline = time.monotonic() + 3 * idle_s
        while exists(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
            pool.workers[0].handle.exit_code()
        assert not exists(pid)
        assert close(session.call(), session.expected())
        assert pids(pool) != [pid]
    finally:
        pool.close()


class Unnoticed:
    """A handle whose process seems to run as long as nobody has tried to talk to it."""

    def __init__(self, handle):
        self.handle, self.channel, self.is_killed = handle, handle.channel, False

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def exit_code(self):
        return self.handle.exit_code() if self.is_killed else None

    def kill(self):
        self.is_killed = True
        self.handle.kill()


def test_a_worker_that_left_for_idleness_just_as_it_was_asked_is_replaced():
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    try:
        idle_s = 1.5 * patience()
        session = Session(pool, 3, idle_s=idle_s)
        session.call()
        before = pids(pool)
        deadline = time.monotonic() + 3 * idle_s
        while any(map(exists, before)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(exists, before))
        for worker in pool.workers:
            worker.handle = Unnoticed(worker.handle)
        assert close(session.call(), session.expected())
        found = session.state.section().json
        assert (found["calls_distributed"], found["calls_local"]) == (2, 0)
        assert not set(before) & set(pids(pool))
        assert len(pids(pool)) == 2
    finally:
        pool.close()


def test_a_worker_that_was_busy_lately_is_not_asked_and_its_loss_is_told(pool):
    """Whoever ends in the middle of a call has not left for idleness: nothing is repeated."""
    session = Session(pool, 3)
    session.call()
    assert not any(worker.may_have_left for worker in pool.workers)
    pool.workers[0].handle = Unnoticed(pool.workers[0].handle)
    os.kill(pids(pool)[0], signal.SIGKILL)
    pool.workers[0].handle.is_killed = False
    error, _ = fails(session)
    assert "Worker 1 (cpu) ended with code" in str(error)
    assert close(session.call(), session.expected())


class OneAtATime(fake_worker.Models):
    """Threads of one process have one random generator, from which weights come."""

    lock = threading.Lock()

    def load(self, message):
        with self.lock:
            return super().load(message)


class ThreadHandle:
    """A worker that is a thread."""

    def __init__(self, launcher):
        ours, theirs = Pipe()
        self.channel, self.pid = Channel(ours), 0
        self._thread = threading.Thread(target=launcher.work, args=(Channel(theirs),), daemon=True)
        self._thread.start()

    def exit_code(self):
        return None if self._thread.is_alive() else 0

    def log_tail(self):
        return ""

    def news(self):
        return []

    def abort(self, epoch):
        pass

    def kill(self):
        self.channel.close()
        self._thread.join()


class ThreadLauncher:
    """All that a launcher has to be: handles with channels to something that serves them."""

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, specs, *, meanwhile=None):
        self.started += [spec.device for spec in specs]
        return [ThreadHandle(self) for _ in specs]

    def work(self, channel):
        start, _ = channel.recv()
        channel.send(Done())
        Server(channel, OneAtATime(), torch.device(start.device), start.idle_s).serve()

    def close(self):
        self.started.clear()


def test_another_launcher_needs_no_other_engine(tmp_path):
    launcher = ThreadLauncher(tmp_path)
    pool = Pool(lambda: launcher)
    try:
        session = Session(pool, 3)
        for _ in range(2):
            assert close(session.call(), session.expected())
        assert launcher.started == ["cpu", "cpu"]
        assert session.state.section().json["calls_distributed"] == 2
    finally:
        pool.close()
    assert launcher.started == []


def test_closing_ends_the_processes_and_removes_the_folder():
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    Session(pool, 2).call()
    folder, (pid,) = pool.crew.folder, pids(pool)
    assert folder.stat().st_mode & 0o777 == 0o700
    pool.close()
    assert not exists(pid)
    assert not folder.exists()
    pool.close()


ORPHANS = """
import sys
sys.path.insert(0, {tests!r})
import comfy_home
comfy_home.load_pack()
sys.path.insert(0, {tests!r} + "/unit")
from parallel_session import PROGRAM, Session, pids
from slipstream.parallel.launcher import LocalLauncher
from slipstream.parallel.pool import Pool
pool = Pool(lambda: LocalLauncher(PROGRAM))
Session(pool, 3).call()
print(*pids(pool), pool.crew.folder, flush=True)
sys.stdin.read()
"""


def test_no_orphan_and_no_meeting_after_sigkill_of_the_parent(pool):
    """Another process has a pool of its own; when it is killed, its workers end by themselves."""
    code = textwrap.dedent(ORPHANS).format(tests=str(Path(comfy_home.__file__).parent))
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        *orphans, folder = parent.stdout.readline().split()
        session = Session(pool)
        assert close(session.call(), session.expected())
        assert not set(map(int, orphans)) & set(pids(pool))
        assert folder != str(pool.crew.folder)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 2
    while any(exists(int(pid)) for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(orphans) == 2
    assert not any(exists(int(pid)) for pid in orphans)
    assert Path(folder).exists(), "a killed parent cannot remove it"
    LocalLauncher(PROGRAM).close()
    assert not Path(folder).exists(), "the next one does"


def test_an_interrupt_while_workers_start():
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    session = Session(pool, 3)

    def interrupt():
        raise KeyboardInterrupt

    object.__setattr__(session.state.shared, "meanwhile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.call()
    assert pool.workers == []
    object.__setattr__(session.state.shared, "meanwhile", lambda: None)
    assert close(session.call(), session.expected())
    pool.close()


def test_a_worker_that_does_not_start_shows_its_log(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("print('no such thing'); raise SystemExit(3)")
    launcher = LocalLauncher(program)
    with pytest.raises(StartFailed, match=r"ended with code 3\.(?s:.*)no such thing"):
        launcher.start([Spec(device="cpu", num_threads=1)])
    launcher.close()


def test_who_has_not_the_key_gets_nowhere(tmp_path):
    """A stranger on the same machine connects first; the worker still comes through."""
    marker = tmp_path / "address"
    program = tmp_path / "late.py"
    program.write_text(
        f"import sys, time, runpy\nopen({str(marker)!r}, 'w').write(sys.argv[2])\ntime.sleep(0.5)\n"
        f"sys.argv[0] = {str(PROGRAM)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    launcher = LocalLauncher(program)
    refused = []

    def intrude():
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.01)
        try:
            Client(("127.0.0.1", int(marker.read_text())), authkey=b"guess")
        except (AuthenticationError, EOFError, OSError) as error:
            refused.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    (handle,) = launcher.start([Spec(device="cpu", num_threads=1)])
    thread.join()
    handle.kill()
    launcher.close()
    assert refused


def test_a_stranger_who_says_nothing_keeps_nobody_waiting(tmp_path):
    """Any local user may connect: the key is asked for in a thread of each connection's own."""
    marker = tmp_path / "address"
    program = tmp_path / "late.py"
    program.write_text(
        f"import sys, time, runpy\nopen({str(marker)!r}, 'w').write(sys.argv[2])\ntime.sleep(1)\n"
        f"sys.argv[0] = {str(PROGRAM)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    launcher = LocalLauncher(program)
    silent = []

    def connect():
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.01)
        silent.append(socket.create_connection(("127.0.0.1", int(marker.read_text()))))

    thread = threading.Thread(target=connect)
    thread.start()
    (handle,) = launcher.start([Spec(device="cpu", num_threads=1)])
    thread.join()
    handle.kill()
    launcher.close()
    silent[0].close()


def test_a_worker_gets_its_own_gpu_and_allocator():
    inherited = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "PYTHONPATH": "x", "HOME": "h",
        "CUDA_VISIBLE_DEVICES": "4,7",
    }  # fmt: skip
    env = worker_environment(inherited, Spec(device="cuda:1", num_threads=2))
    assert env["CUDA_VISIBLE_DEVICES"] == "7"
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTHONPATH" not in env
    assert env["OMP_NUM_THREADS"] == "2"
    plain = worker_environment({}, Spec(device="cuda:1", num_threads=1))
    assert plain["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment({}, Spec(device="cpu", num_threads=1))
