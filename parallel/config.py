"""Settings of sequence parallel, and what follows from them without a device: devices, layout.

Rank 0 is ComfyUI's own process; `workers` counts it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..backends.errors import SlipstreamError
from .mesh import Layout

MAX_WORKERS = 64


class ParallelError(SlipstreamError, ValueError):
    """A mistake in the node's settings, as one sentence with the fix in it."""


@dataclass(frozen=True, kw_only=True)
class SequenceParallelConfig:
    """workers: processes (0 chooses); devices: comma-separated, rank 0's first ("" chooses);
    batch, cfg, ulysses, ring: degrees (0 chooses); timeout_s: longest wait at one exchange; idle_s:
    unused workers end after so long (0: they stay). Raises ParallelError with a sentence.
    """

    workers: int = 0
    devices: str = ""
    ulysses: int = 0
    ring: int = 0
    cfg: int = 0
    batch: int = 0
    timeout_s: float = 60
    idle_s: float = 900

    def __post_init__(self) -> None:
        for name in ("workers", "batch", "cfg", "ulysses", "ring"):
            highest = 2 if name == "cfg" else MAX_WORKERS
            value = getattr(self, name)
            if not 0 <= value <= highest:
                raise ParallelError(f"{name} is {value}: choose 0 (automatic) to {highest}.")
        if self.timeout_s <= 0:
            raise ParallelError(f"timeout_s is {self.timeout_s:g}: choose a number above 0.")
        if self.idle_s < 0:
            raise ParallelError(f"idle_s is {self.idle_s:g}: choose 0 (never) or more.")
        named = self.device_names
        if self.workers and named and len(named) != self.workers:
            raise ParallelError(
                f"devices names {len(named)} devices for {self.workers} workers. "
                f"Name {self.workers}, or leave it empty."
            )
        for name in named:
            if name != "cpu" and not name.startswith("cuda"):
                raise ParallelError(f"devices: '{name}' is not cpu or cuda:0, cuda:1, ...")
            if name != "cpu" and named.count(name) > 1:
                raise ParallelError(
                    f"devices names {name} twice; NCCL allows one process per GPU. "
                    "Name another, or lower workers."
                )
        self.check_degrees(self.workers or len(named))

    def check_degrees(self, world: int) -> None:
        """Raise ParallelError if so many processes (0: not known yet) cannot have the degrees."""
        degrees = (self.batch, self.cfg, self.ulysses, self.ring)
        if not world or not any(degrees):
            return
        product = math.prod(degree or 1 for degree in degrees)
        fits = product == world if all(degrees) else world % product == 0
        if not fits:
            shown = " x ".join(
                f"{name} {value}"
                for name, value in zip(("batch", "cfg", "ulysses", "ring"), degrees, strict=True)
                if value
            )
            raise ParallelError(
                f"{shown} is {product} processes, but workers is {world}. "
                f"Set one of them to 0 (auto) or workers to {product}."
            )

    @property
    def splits_tokens(self) -> bool:
        """Whether the settings ask for tokens to be shared."""
        return self.ulysses > 1 or self.ring > 1

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices named, in order; "cuda" is cuda:0."""
        parts = (p.strip().lower() for p in self.devices.split(","))
        return tuple("cuda:0" if p == "cuda" else p for p in parts if p)

    @property
    def is_explicit(self) -> bool:
        """Whether the user asked for a number of workers, or named devices."""
        return self.workers > 0 or bool(self.device_names)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_devices(
    config: SequenceParallelConfig, *, found: Sequence[str], alike: Sequence[str], own: str
) -> tuple[str, ...]:
    """Device of every rank; one entry means that there is nothing to share.

    found: GPUs that this process sees, which may be named; alike: those of one kind with `own`,
    which are chosen from where none is named; own: where ComfyUI has the model.
    """
    named = config.device_names
    if config.workers == 1 or len(named) == 1:
        return (own,)
    for name in named:
        if name != "cpu" and name not in found:
            seen = ", ".join(found) or "no GPU"
            raise ParallelError(f"devices: '{name}' does not exist here (found {seen}).")
    if named:
        if named[0] != own:
            raise ParallelError(
                f"devices starts with {named[0]}, but ComfyUI has this model on {own}: "
                f"put {own} first."
            )
        return named
    rest = [name for name in alike if name != own]
    if not config.workers:
        return (own, *rest)
    if len(rest) + 1 < config.workers:
        seen = ", ".join(alike) or "no GPU"
        others = [name for name in found if name not in alike]
        unlike = f" ({', '.join(others)}: another kind of GPU)" if others else ""
        raise ParallelError(
            f"workers is {config.workers}, but {seen} is all there is here{unlike}. "
            "Lower workers, or name devices ('cpu' may repeat)."
        )
    return (own, *rest[: config.workers - 1])


def choose_layout(
    config: SequenceParallelConfig,
    *,
    world: int,
    num_heads: int | None,
    num_rows: int = 1,
    num_conds: int = 1,
    has_plan: bool = True,
) -> Layout:
    """Degrees for `world` processes and calls of `num_rows` rows.

    num_conds: calls that may run at the same time; has_plan: tokens can be shared. Rows come
    first, as many lanes as divide the processes that are left to them, then prompts, then tokens:
    Ulysses while there are heads, then ring. Processes may have nothing to do: half of them with
    cfg 2 and one conditioning, and those that only tokens could use where has_plan is false.
    """
    degrees = (config.ulysses or 1) * (config.ring or 1) if has_plan else 1
    limit = config.batch or max(world // (degrees * (config.cfg or 1)), 1)
    batch = max(
        n
        for n in range(1, min(limit, max(num_rows, 1)) + 1)
        if n == 1 or not has_plan or limit % n == 0
    )
    rest = world // batch
    if config.cfg == 2:
        cfg, ranks = (2 if num_conds > 1 else 1), max(rest // 2, 1)
    elif config.cfg == 0 and num_conds == 2 and _has_room(config, rest, has_plan=has_plan):
        cfg, ranks = 2, rest // 2
    else:
        cfg, ranks = 1, rest
    ulysses, ring = _split(config, ranks, num_heads) if has_plan else (1, 1)
    return Layout(batch=batch, cfg=cfg, ulysses=ulysses, ring=ring)


def _has_room(config: SequenceParallelConfig, ranks: int, *, has_plan: bool) -> bool:
    """Whether two prompts may be on two halves of so many processes."""
    if not has_plan:
        return ranks >= 2
    degrees = (config.ulysses or 1) * (config.ring or 1)
    if config.ulysses and config.ring:
        return ranks == 2 * degrees
    return ranks % 2 == 0 and (ranks // 2) % degrees == 0


def _split(config: SequenceParallelConfig, ranks: int, num_heads: int | None) -> tuple[int, int]:
    """Ulysses and ring degrees of a lane of at most `ranks` processes."""
    if config.ulysses:
        ulysses = config.ulysses
    elif config.ring:
        ulysses = max(ranks // config.ring, 1)
    else:
        limit = ranks if num_heads is None else max(min(ranks, num_heads), 1)
        ulysses = next(n for n in range(limit, 0, -1) if ranks % n == 0)
    return ulysses, config.ring or max(ranks // ulysses, 1)
