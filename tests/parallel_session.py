"""One run that shares calls of a FakeTokenNet with the workers of a Pool, without ComfyUI."""

import time
from pathlib import Path

import fake_net
import pytest
import torch
from fake_patcher import FakePatcher
from slipstream.backends.calls import CALL, BranchKey, ModelCall
from slipstream.backends.run import Run
from slipstream.parallel.config import SequenceParallelConfig
from slipstream.parallel.crew import Setting
from slipstream.parallel.messages import Load
from slipstream.parallel.network_call import NetworkCall
from slipstream.parallel.payload import encode_patches
from slipstream.parallel.pool import Model
from slipstream.parallel.route import BRANCH
from slipstream.parallel.run_state import ParallelRun
from slipstream.parallel.shared import Shared

PROGRAM = Path(fake_net.__file__).with_name("fake_worker.py")
TIMEOUT_S = 2


def model(seed=0, patches=None):
    patches = patches or {}
    load = Load(f"seed {seed}", "fake", "net", ["tuple"], seed, {})
    return Model(
        load=load,
        version=str(sorted(patches)),
        patches=lambda: encode_patches(patches, lambda value: None),
        attributes=["dict"],
        casts_weights=False,
    )


class Session:
    """One run that shares calls of a FakeTokenNet with the pool's workers."""

    def __init__(
        self, pool, world=3, *, seed=0, patches=None, idle_s=0, plan=fake_net.PLAN, **config
    ):
        self.net = fake_net.FakeTokenNet(seed)
        self.pool, self.index = pool, 0
        devices = ("cpu",) * world
        self.config = SequenceParallelConfig(
            devices=",".join(devices), workers=world, timeout_s=TIMEOUT_S,
            **{"cfg": 1, "batch": 1, **config},
        )  # fmt: skip
        shared = Shared(
            pool=pool, devices=devices, device=torch.device("cpu"),
            setting=Setting("", {}, 1, TIMEOUT_S, idle_s), model=model(seed, patches),
            network=self.net, plan=plan, num_heads=3, techniques={},
            meanwhile=lambda: None, memory_bytes=lambda shape: 0,
            no_plan="" if plan else "No token plan",
        )  # fmt: skip
        self.run = Run(FakePatcher(torch.nn.Module()), torch.tensor([1.0, 0.0]), {})
        self.state = ParallelRun(self.run, self.config, shared)

    def call(self, x=None, *, fault=None, branch=None, **options):
        x = torch.ones(2, 11, 24) * torch.arange(24) / 24 if x is None else x
        self.index += 1
        call = ModelCall(self.index, 0, 0, BranchKey((), 0, None), (0,))
        options = {CALL: call, **options}
        if fault:
            options["fault"] = fault
        if branch is not None:
            options[BRANCH] = branch
        found = NetworkCall(("x",), {"x": x}, options)
        with torch.inference_mode():
            return self.state.call(self.net.forward, found, "forward", self.net)

    def expected(self, x=None):
        x = torch.ones(2, 11, 24) * torch.arange(24) / 24 if x is None else x
        with torch.inference_mode():
            return self.net(x)


def close(a, b):
    return (a - b).abs().max() < 1e-5


def pids(pool):
    return [worker.handle.pid for worker in pool.workers]


def exists(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def fails(session, **call):
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        session.call(**call)
    return caught.value, time.monotonic() - started
