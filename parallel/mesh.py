"""Where a process stands among the others, and the groups it needs there.

batch x cfg x ulysses x ring processes, in lanes of ulysses * ring. A lane does the whole of some
rows of a call; the `batch` lanes of a branch have those of one call, and there are `cfg` branches,
whose calls run at the same time. Within a lane, rank r is number r % ulysses of ring chunk
r // ulysses: it exchanges heads with the ranks of its chunk and passes keys to the same number of
the next chunk. Process 0 is ComfyUI's own: it leads lane 0 and hands work to every other lane over
a group of its own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from . import comm
from .comm import Clock, Group


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of one arrangement of processes."""

    batch: int = 1
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def ranks(self) -> int:
        """Processes of one lane."""
        return self.ulysses * self.ring

    @property
    def world(self) -> int:
        return self.batch * self.cfg * self.ranks

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        return self.batch, self.cfg, self.ulysses, self.ring

    def lane(self, process: int) -> int:
        return process // self.ranks

    def rank(self, process: int) -> int:
        """Rank within the lane."""
        return process % self.ranks

    def lanes(self, branch: int) -> range:
        """Lanes that share the calls of a branch."""
        return range(branch * self.batch, (branch + 1) * self.batch)

    def members(self, lane: int) -> range:
        """Processes of a lane."""
        return range(lane * self.ranks, (lane + 1) * self.ranks)

    def __str__(self) -> str:
        named = zip(("batch", "cfg", "ulysses", "ring"), self.degrees, strict=True)
        return " x ".join(f"{name} {degree}" for name, degree in named)


Build = Callable[[str, int, int], Group]  # name, rank, world


class Mesh:
    """The ranks that share one call. `main` has all of them; the others are None at degree 1."""

    def __init__(self, layout: Layout, rank: int, name: str, build: Build):
        self.rank, self.world = rank, layout.ranks
        self.ulysses, self.ring = layout.ulysses, layout.ring
        self.ring_rank, self.ulysses_rank = divmod(rank, layout.ulysses)
        self.main = build(f"{name}/main", rank, self.world)
        self.heads: Group | None = None
        self.keys: Group | None = None
        if self.ring == 1:
            self.heads = self.main
        elif self.ulysses > 1:
            self.heads = build(f"{name}/heads{self.ring_rank}", self.ulysses_rank, self.ulysses)
        if self.ulysses == 1:
            self.keys = self.main
        elif self.ring > 1:
            self.keys = build(f"{name}/keys{self.ulysses_rank}", self.ring_rank, self.ring)

    @property
    def chunk(self) -> range:
        """Ranks of this rank's ring chunk."""
        return range(self.ring_rank * self.ulysses, (self.ring_rank + 1) * self.ulysses)

    def gather(
        self, local: torch.Tensor, rows: Sequence[int], dim: int, *, leader_only: bool
    ) -> torch.Tensor | None:
        """All ranks' rows along `dim` in rank order; None on other ranks if leader_only.

        rows: length along `dim` on every rank. Sends local.nbytes to each receiving rank.
        """
        receives = not leader_only or self.rank == 0
        shapes = [_resized(local.shape, dim, n) if receives else None for n in rows]
        parts = [local if not leader_only or r == 0 else None for r in range(self.world)]
        found = self.main.exchange(parts, shapes).wait()
        return torch.cat(found, dim) if receives else None

    def measure(self, num_bytes: int) -> float:
        """Bytes per second that one rank sends while all exchange; every rank must call it."""
        rows = torch.zeros(num_bytes, dtype=torch.uint8, device=self.main.clock.device)
        shapes = [(num_bytes,)] * self.world
        seconds = []
        for _ in range(3):  # the first ones warm up connections and caches
            started = time.perf_counter()
            self.main.exchange([rows] * self.world, shapes).wait()
            comm.synchronize(rows.device)
            seconds.append(time.perf_counter() - started)
        return num_bytes * (self.world - 1) / max(min(seconds), 1e-9)


class Links:
    """All groups of one process under one layout.

    relays: by lane, the group that joins process 0, its root, and the ranks of that lane; process
    0 has all of them, a worker its own.
    """

    def __init__(
        self,
        layout: Layout,
        process: int,
        store: dist.Store,
        *,
        name: str,
        backend: str,
        timeout_s: float,
        clock: Clock,
    ):
        self.layout, self.process, self.name, self.clock = layout, process, name, clock
        self.backend = backend
        self.mesh: Mesh | None = None
        self.relays: dict[int, Group] = {}
        self._built: list[Group] = []

        def build(group: str, rank: int, world: int) -> Group:
            built = Group(
                store, f"{name}/{group}", rank=rank, world=world,
                backend=backend, timeout_s=timeout_s, clock=clock,
            )  # fmt: skip
            self._built.append(built)
            return built

        own, rank = layout.lane(process), layout.rank(process)
        try:
            if layout.ranks > 1:
                self.mesh = Mesh(layout, rank, f"lane{own}", build)
            for lane in range(1, layout.batch * layout.cfg):
                if process == 0 or lane == own:
                    number = 0 if process == 0 else rank + 1
                    self.relays[lane] = build(f"relay{lane}", number, layout.ranks + 1)
        except BaseException:
            self.close()
            raise

    def entry(self, lane: int) -> Group:
        """The group over which process 0, its root, hands calls to the ranks of `lane`."""
        if lane:
            return self.relays[lane]
        assert self.mesh is not None
        return self.mesh.main

    @property
    def own_lane(self) -> int:
        return self.layout.lane(self.process)

    def close(self) -> None:
        """Drop all groups: whoever waits for this process fails at once."""
        for group in self._built:
            group.close()

    def abort(self) -> None:
        """End this process's own waiting collectives, from any thread; see Group.abort."""
        for group in self._built:
            group.abort()


def _resized(shape: Sequence[int], dim: int, length: int) -> list[int]:
    found = list(shape)
    found[dim] = length
    return found
