"""What rank 0 and its workers say to each other. Every message to a worker has one answer.

Messages are frozen dataclasses of plain JSON values; whatever is not plain was encoded by wire.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .wire import Meta

PROTOCOL = 3

# Why a worker failed: its peers are gone (a symptom), the plan does not fit, its device is full,
# or anything else.
TRANSPORT, PLAN, MEMORY, ERROR = "transport", "plan", "memory", "error"


@dataclass(frozen=True)
class Hello:
    """Worker, unasked: which one it is."""

    number: int
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Start:
    """Become a ComfyUI. comfyui: folder; arguments: ComfyUI's own, encoded; idle_s: end after."""

    comfyui: str
    arguments: Any
    device: str
    num_threads: int
    idle_s: float


@dataclass(frozen=True)
class Groups:
    """Join groups. epoch: groups of another one are gone; name: of these; store: file;
    process: the worker's number in the layout (batch, cfg, ulysses, ring)."""

    epoch: int
    name: str
    store: str
    process: int
    layout: tuple[int, int, int, int]
    backend: str
    timeout_s: float


@dataclass(frozen=True)
class Measure:
    """Exchange some bytes, so that rank 0 knows the speed of the links."""

    groups: str
    num_bytes: int


@dataclass(frozen=True)
class Load:
    """Load a model by the recipe ComfyUI recorded.

    weights: parameter name -> its first values as rank 0 has them: the file may have changed.
    """

    key: str
    module: str
    function: str
    arguments: Any
    index: int | None
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class Patches:
    """Weight patches of a loaded model: encoded, tensors beside. Answer: {"count", "sha256"}.

    attributes: encoded values by path below the model; casts_weights: to the input's dtype.
    """

    key: str
    version: str
    patches: Any
    attributes: Any
    casts_weights: bool


@dataclass(frozen=True)
class Ready:
    """A sampling run begins: put the model on the device, as far as its budget allows.

    run: facts of the run (runs.py). May take as long as reading the weights from a disk.
    """

    key: str
    run: Any


@dataclass(frozen=True)
class Forward:
    """Join one model call; its tensors (`metas`) follow over the groups.

    arguments: of network.method: [positional names, arguments, options], the latter two encoded;
    call: facts of this call (runs.py); is_timed: wait for the device, to say how long it took.
    Answer of the leader of a lane but the first: {"out": encoded output, "metas": of its tensors},
    which follow over the groups, and "seconds": None if not timed.
    """

    key: str
    groups: str
    method: str
    arguments: Any
    metas: list[Any]
    call: Any
    is_timed: bool = False


@dataclass(frozen=True)
class EndRun:
    """The sampling run is over: drop what was kept for it. Answer: as of Ping."""


@dataclass(frozen=True)
class Park:
    """Take a model, or all (""), off the device; it stays loaded, its weights mapped."""

    key: str


@dataclass(frozen=True)
class Unload:
    """Drop a model, or all ("")."""

    key: str


@dataclass(frozen=True)
class Ping:
    """Are you there? Answer: {"models": how many, "num_on_device": of them, "private_bytes": of
    the process alone, "device_bytes": peak since the last question; both None where unknown}."""


@dataclass(frozen=True)
class Exit:
    """End. There is no answer."""


@dataclass(frozen=True)
class Done:
    """Worker: the message was carried out."""

    facts: Any = None


@dataclass(frozen=True)
class Failed:
    """Worker: it was not. cause: one of the four above; summary: the exception's own line."""

    cause: str
    summary: str
    traceback: str


Message = (
    Hello
    | Start
    | Groups
    | Measure
    | Load
    | Patches
    | Ready
    | Forward
    | EndRun
    | Park
    | Unload
    | Ping
    | Exit
    | Done
    | Failed
)
_KINDS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        Hello, Start, Groups, Measure, Load, Patches, Ready, Forward, EndRun, Park, Unload, Ping,
        Exit, Done, Failed,
    )
}  # fmt: skip


def to_bytes(message: Message, tensors: Sequence[torch.Tensor] = ()) -> bytes:
    """One frame: the message, and the metas of the tensors that follow it as frames."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    frame = {
        "kind": type(message).__name__,
        "values": values,
        "tensors": [Meta.of(t).to_json() for t in tensors],
    }
    return json.dumps(frame).encode()


def from_bytes(frame: bytes) -> tuple[Message, list[Meta]]:
    """The message of a frame and the metas of its tensors. Raises ValueError if it is none."""
    try:
        found = json.loads(frame)
        message = _KINDS[found["kind"]](**found["values"])
        return message, [Meta.from_json(m) for m in found["tensors"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a message: {error}") from error
