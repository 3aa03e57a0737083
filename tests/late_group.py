"""Process groups with NCCL's semantics over gloo: waits return at once, the device waits instead.

A collective is put on a stream. It is waited for where a process needs the device: in
`synchronize`, or when the stream is full. A peer that is gone, or never comes, is waited for
without end; only `abort`, from any thread of the own process, ends that. What was to be received
is void then. As on a GPU, a call's own arithmetic goes on meanwhile: on the right values if the
peers are prompt (it is given a moment, since the CPU has no stream that would wait for it).
"""

import os
import threading
import time
from datetime import timedelta

import fake_net
import torch.distributed as dist

MAX_ENQUEUED = 6  # a stream holds about a thousand launches
_PROMPT_S = 1.0  # how long a good peer may take
_ASKED = "SLIPSTREAM_TEST_LATE_GROUPS"


def install_if_asked(comm):
    """For a worker program: as `install`, if rank 0's test did so."""
    if os.environ.get(_ASKED):
        install(comm, setattr)


def install(comm, set_attribute):
    """Groups of backend "nccl" are LateGroups from now on; `comm`: the pack's module."""
    stream = Stream()

    def build(store, rank, world, timeout):
        return LateGroup(store, rank, world, stream)

    class Marker:
        def __init__(self, device):
            self.last = stream.last

        def is_done(self):
            return self.last is None or self.last.is_over()

    set_attribute(comm, "_nccl", build)
    set_attribute(comm, "Marker", Marker)
    set_attribute(comm, "synchronize", lambda device: stream.synchronize())
    return stream


def asked(monkeypatch):
    """Workers that start from here on have LateGroups."""
    monkeypatch.setenv(_ASKED, "1")


class Stream:
    """Collectives in the order in which they were enqueued."""

    def __init__(self):
        self.lock = threading.Lock()
        self.works = []
        self.is_stalled = False  # one has had its moment, and the others are behind it

    def put(self, work):
        self.is_stalled = self.is_stalled and self.num_enqueued() > 0
        with self.lock:
            self.works.append(work)

    @property
    def last(self):
        return self.works[-1] if self.works else None

    def num_enqueued(self):
        with self.lock:
            self.works = [work for work in self.works if not work.is_over()]
            return len(self.works)

    def synchronize(self):
        """What a process does that needs the device: no exception ends it."""
        while self.num_enqueued():
            time.sleep(0.005)


class LateWork:
    """A collective on the stream."""

    def __init__(self, group, work):
        self.group, self.work, self.is_lost = group, work, False
        group.stream.put(self)

    def is_over(self):
        """Done, or aborted. A transport that failed is a kernel that spins for ever."""
        if self.group.is_aborted:
            return True
        if not self.is_lost and self.work.is_completed():
            try:
                self.work.wait()
                return True
            except RuntimeError:
                self.is_lost = True
        return False

    def wait(self):
        stream = self.group.stream
        deadline = time.monotonic() + _PROMPT_S
        while not (stream.is_stalled or self.is_over() or self.is_lost):
            time.sleep(0.0005)
            stream.is_stalled = time.monotonic() > deadline
        while self.group.stream.num_enqueued() > MAX_ENQUEUED:
            time.sleep(0.005)  # a launch into a full queue


class Transfer:
    """A send or recv of gloo, which only knows that it is done once somebody has waited for it."""

    def __init__(self, work):
        self.work, self.error, self.is_over = work, None, False
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        try:
            self.work.wait()
        except RuntimeError as error:
            self.error = error
        self.is_over = True

    def is_completed(self):
        return self.is_over

    def wait(self):
        if self.error is not None:
            raise self.error


class Done:
    """A collective that this process believes in, and its device never sees."""

    def wait(self):
        pass


class LateGroup:
    """What ProcessGroupNCCL is to comm.py."""

    def __init__(self, store, rank, world, stream):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(days=1)
        self.group = dist.ProcessGroupGloo(store, rank, world, options)
        self.stream, self.is_aborted, self.is_dead = stream, False, False
        _kept.append(self.group)

    def abort(self):
        self.is_aborted = True

    def __getattr__(self, method):
        def call(*args):
            if fake_net.Hanging.is_asked and method == "alltoall_base":
                fake_net.Hanging.is_asked, self.is_dead = False, True
            if self.is_dead:
                return Done()
            work = getattr(self.group, method)(*args)
            return LateWork(self, Transfer(work) if method in ("send", "recv") else work)

        return call


_kept = []  # closing a gloo group would free its peers, which NCCL does not do
