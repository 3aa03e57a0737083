"""A worker process: becomes a ComfyUI without server and nodes, and serves rank 0."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch

from ..backends import host, worker_host
from ..backends.frame_room import with_room
from ..backends.run import attached
from .channel import Channel
from .launcher import LOG_FORMAT
from .lifeline import Lifeline
from .messages import Done, Hello, Load, Patches, Start
from .payload import decode_patches, encode_patches
from .runs import RunFacts, WorkerRun
from .serve import Server
from .wire import decode

OWN_PACKAGE = (__package__ or "").rpartition(".")[0]


def main(arguments: Sequence[str]) -> None:
    """HOST PORT NUMBER; the key is the first line of stdin."""
    address, port, number = arguments
    lifeline = Lifeline()
    channel = Channel(Client((address, int(port)), authkey=lifeline.key))
    channel.send(Hello(int(number)))
    start, _ = channel.recv()
    assert isinstance(start, Start)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
    torch.set_num_threads(start.num_threads)
    device = torch.device(start.device)  # the only one that it sees: it is the current one
    given = decode(start.arguments, [])
    given["cpu"] = device.type == "cpu"
    worker_host.become_comfyui(start.comfyui, given)
    channel.send(Done())
    server = Server(
        channel, LoadedModels(device), device, start.idle_s, interrupt=worker_host.interrupt
    )
    lifeline.on_abort = server.abort
    with_room(server.serve)
    sys.stdout.flush()
    os._exit(0)  # the thread that waits for stdin would hold the process


class LoadedModel:
    """One model with its patches."""

    def __init__(self, patcher: Any):
        self.patcher = patcher
        self.network = host.diffusion_model(patcher)

    def begin(self, facts: RunFacts, decide: Callable[[Any, bool], bool]) -> WorkerRun:
        """A sampling run of rank 0, with the techniques it named and the weights on the device."""
        patcher = self.patcher
        for name, fields in facts.techniques.items():
            patcher = _APPLY[name](patcher, fields, decide)
        run = WorkerRun(patcher, facts, attached(patcher))
        worker_host.make_ready(patcher, facts.memory_bytes)
        return run


class LoadedModels:
    """What this worker has loaded, by rank 0's keys; `device` is its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bases: dict[str, Any] = {}
        self._models: dict[str, LoadedModel] = {}

    def __getitem__(self, key: str) -> LoadedModel:
        return self._models[key]

    def load(self, message: Load) -> dict[str, Any]:
        """Follow the recipe. Raises ValueError if it does not give the weights that rank 0 has."""
        arguments = decode(message.arguments, [], device=self._device)
        recipe = worker_host.Recipe(message.module, message.function, arguments, message.index)
        patcher = worker_host.load(recipe, OWN_PACKAGE)
        if worker_host.weights_print(patcher, list(message.weights)) != message.weights:
            files = ", ".join(path.name for path in recipe.files)
            raise ValueError(f"{files} has changed since ComfyUI loaded it: load it again")
        self._bases[message.key] = patcher
        return self.facts()

    def patch(self, message: Patches, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """Put the patches on the model; answers with what arrived."""
        patches = decode_patches(message.patches, tensors, worker_host.adapter)
        _, _, sha256 = encode_patches(patches, worker_host.adapter_parts)
        base = self._bases[message.key]
        attributes = worker_host.Attributes(decode(message.attributes, []), message.casts_weights)
        patched = worker_host.patched(base, patches, message.version, attributes)
        self._models[message.key] = LoadedModel(patched)
        return {"count": len(patches), "sha256": sha256}

    def unload(self, key: str) -> None:
        """Drop one model, or all ("")."""
        for known in [key] if key else list(self._bases):
            self._models.pop(known, None)
            base = self._bases.pop(known, None)
            if base is not None:
                worker_host.unload(base)

    def park(self, key: str) -> None:
        """Take one model, or all (""), off the device; its weights stay mapped."""
        for base in [self._bases[key]] if key else list(self._bases.values()):
            worker_host.unload(base)

    def facts(self) -> dict[str, Any]:
        return {
            "models": len(self._bases),
            "num_on_device": worker_host.num_loaded(),
            "private_bytes": private_bytes(),
            "device_bytes": worker_host.peak_bytes(self._device),
        }


def private_bytes() -> int | None:
    """Memory that this process alone uses (Linux), None elsewhere."""
    status = Path("/proc/self/smaps_rollup")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines()[1:])
    return sum(int(f[1]) * 1024 for f in lines if f[0] in ("Private_Clean:", "Private_Dirty:"))


def _attention(patcher: Any, fields: dict[str, Any], decide: Any) -> Any:
    from ..backends.attention.apply import apply_attention
    from ..backends.attention.config import AttentionConfig

    return apply_attention(patcher, AttentionConfig(**fields))


def _cache(patcher: Any, fields: dict[str, Any], decide: Any) -> Any:
    from ..backends.cache.apply import apply_cache
    from ..backends.cache.config import CacheConfig

    return apply_cache(patcher, CacheConfig(**fields), decider=decide)


def _offload(patcher: Any, fields: dict[str, Any], decide: Any) -> Any:
    from ..backends.offload.apply import apply_offload
    from ..backends.offload.config import OffloadConfig

    return apply_offload(patcher, OffloadConfig.from_json(fields))


_APPLY: dict[str, Callable[[Any, dict[str, Any], Any], Any]] = {
    "attention": _attention,
    "cache": _cache,
    "offload": _offload,
}
