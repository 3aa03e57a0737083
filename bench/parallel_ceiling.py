"""What this machine can give n CPU ranks at most: their shares of a call at once, nobody waits.

Every process computes what one rank of n does of a call: its rows of a batch, or its tokens through
the pack's own engine, with groups that send nothing and answer at once. The ceiling is the time of
one process that does all of a call over that of the slowest of n that do their shares at the same
time. What it lacks to n is shared
memory bandwidth, clock speed under load, and the parts of a network that every rank repeats.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .parallel_models import Subject, inputs_of, network_of
from .setup_env import PACK_ROOT, SetupError


class Shares:
    """Idle processes of one thread each; `seconds(n)` lets n of them do their shares of a call."""

    def __init__(self, options: Sequence[str], num_processes: int, environment: dict[str, str]):
        command = [sys.executable, str(PACK_ROOT / "bench"), "parallel", *options]
        self._processes = [
            subprocess.Popen(
                [*command, f"--share={rank}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=environment,
            )
            for rank in range(num_processes)
        ]  # fmt: skip

    def __enter__(self) -> "Shares":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def seconds(self, num_ranks: int) -> float:
        """Until the last of so many shares is done; all processes begin together."""
        used = self._processes[:num_ranks]
        started = time.perf_counter()
        for process in used:
            assert process.stdin is not None
            process.stdin.write(f"{num_ranks}\n")
            process.stdin.flush()
        for process in used:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SetupError("A process that measures the machine's ceiling has ended")
        return time.perf_counter() - started


def serve_shares(comfyui: Path, subject: Subject, rank: int) -> None:
    """The process of one rank: a number of ranks per line in, a line out when its share is done."""
    import torch

    torch.set_num_threads(1)
    network, inputs = network_of(comfyui, subject), inputs_of(subject)
    calls: dict[int, Callable[[], None]] = {}
    for line in sys.stdin:
        world = int(line)
        if world not in calls:
            calls[world] = share(network, inputs, rank, world)
        calls[world]()
        print("done", flush=True)


def share(network: Any, inputs: Mapping[str, Any], rank: int, world: int) -> Callable[[], None]:
    """What does one rank's share of a call: of its rows, or of a single row's tokens.

    inputs: arguments by name, the latent first. All of it if the world is 1.
    """
    import torch

    from ..backends.architectures.plans import find_plan
    from ..backends.architectures.tokens import TokenPlan
    from ..parallel import batch
    from ..parallel.attention import SharedAttention
    from ..parallel.bind import bind
    from ..parallel.comm import Clock
    from ..parallel.engine import Call, EarlyExit
    from ..parallel.hooks import installed
    from ..parallel.mesh import Layout, Mesh

    num_rows = batch.rows(inputs) or 1
    if world == 1 or num_rows > 1:
        counts = batch.deal(num_rows, [1.0] * world)
        start = sum(counts[:rank])
        own = batch.cut(inputs, num_rows, start, counts[rank])

        def rows() -> None:
            if counts[rank]:
                with torch.inference_mode():
                    network(**own, transformer_options={})

        return rows
    plan = find_plan(network)
    assert isinstance(plan, TokenPlan)
    bound = bind(plan.for_call(dict(inputs)), network)
    build: Any = Silence
    mesh, clock = Mesh(Layout(ulysses=world), rank, "share", build), Clock(torch.device("cpu"))

    def part() -> None:
        call = Call(bound, mesh, clock)
        options = {"optimized_attention_override": SharedAttention(call)}
        with torch.inference_mode(), installed(call):
            try:
                network(**inputs, transformer_options=options)
            except EarlyExit:
                return

    return part


class Silence:
    """A group without peers: what it should receive is there at once, and is zeros."""

    def __init__(self, name: str, rank: int, world: int):
        self.rank, self.world = rank, world

    def exchange(self, parts: Sequence[Any], shapes: Sequence[Any]) -> "Received":
        sample = next(part for part in parts if part is not None)
        return Received([sample.new_zeros((0,) if s is None else tuple(s)) for s in shapes])


class Received:
    """As comm.Pending."""

    def __init__(self, tensors: list[Any]):
        self._tensors = tensors

    def wait(self) -> list[Any]:
        return self._tensors

    def joined(self, dim: int) -> Any:
        import torch

        return torch.cat(self._tensors, dim)
