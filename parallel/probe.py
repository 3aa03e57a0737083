"""Whether two devices can exchange at all: two throw-away processes try, before ComfyUI's does.

NCCL's first collective hangs on some boards (IOMMU or ACS between consumer GPUs, a /dev/shm of 64
MB in docker: NVIDIA/nccl#631, nccl-tests#117), and a process in it can only be killed. Peer to peer
copies are the usual culprit, so they are tried again without.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..backends.store import Store
from .comm import NCCL, NCCL_ENVIRONMENT, Clock, TransportError
from .launcher import Spec, worker_environment
from .mesh import Layout, Links

LIMIT_S = 20  # for 2 MB, once both processes run
_START_S = 100  # for a cold import of torch
PROBE_BYTES = 1 << 21
NO_PEER_TO_PEER = {"NCCL_P2P_DISABLE": "1"}
PROGRAM = Path(__file__).with_name("start_worker.py")
_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """bytes_per_s that each of two processes sends while both do, or failure: why there is none."""

    bytes_per_s: float | None = None
    failure: str = ""


def exchange(
    devices: Sequence[str],
    backend: str,
    *,
    num_bytes: int = PROBE_BYTES,
    environment: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> Result:
    """Let two processes, one on each device, exchange `num_bytes`. They are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="slipstream-probe-") as folder:
        peers = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), "probe", f"{folder}/store", str(rank),
                 "cpu" if device == "cpu" else "cuda:0", backend, str(num_bytes), str(limit_s)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**worker_environment(os.environ, Spec(device=device, num_threads=1)),
                     **(environment or {})},
            )
            for rank, device in enumerate(devices)
        ]  # fmt: skip
        try:
            outputs = [peer.communicate(timeout=_START_S + limit_s) for peer in peers]
        except subprocess.TimeoutExpired:
            return Result(failure=f"no end after {_START_S + limit_s:.0f} s")
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()
    for peer, (_, complaint) in zip(peers, outputs, strict=True):
        if peer.returncode:
            lines = complaint.strip().splitlines() or ["it ended without a word"]
            return Result(failure=lines[-1])
    return Result(bytes_per_s=float(outputs[0][0]))


def main(arguments: Sequence[str]) -> None:
    """One of the two processes: STORE RANK DEVICE BACKEND BYTES LIMIT_S."""
    store, rank, name, backend, num_bytes, limit_s = arguments
    device = torch.device(name)
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the start of CUDA is no part of the exchange
    shared = dist.FileStore(store, 2)
    shared.set(f"up{rank}", "")
    shared.wait([f"up{1 - int(rank)}"])
    _end_after(float(limit_s))
    try:
        links = Links(
            Layout(ulysses=2), int(rank), shared, name="probe", backend=backend,
            timeout_s=float(limit_s), clock=Clock(device),
        )  # fmt: skip
        assert links.mesh is not None
        print(links.mesh.measure(int(num_bytes)), flush=True)
    except TransportError as error:
        raise SystemExit(str(error)) from error
    os._exit(0)  # a communicator's own end may wait for the other process


def _end_after(seconds: float) -> None:
    def end() -> None:
        print(f"the exchange did not end in {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class LinkCheck:
    """Remembers, between starts too, what two GPUs need to exchange. folder: where it is kept."""

    def __init__(self, folder: Path | None):
        self._store = Store(folder, "slipstream-links.json", _FORMAT)

    def environment(self, devices: Sequence[str]) -> tuple[dict[str, str], str]:
        """What this process and its workers must set, and the sentence for it ("" for nothing).

        Raises TransportError if the GPUs cannot exchange.
        """
        if dict(NO_PEER_TO_PEER).items() <= os.environ.items():
            return {}, ""
        key, known = _key(devices), self._store.read()
        kept = known.get("links", {}).get(key)
        if kept is None:
            kept = _try(devices)
            self._store.write({"links": {**known.get("links", {}), key: kept}})
        if not kept:
            return {}, ""
        return dict(kept), (
            f"{devices[0]} and {devices[1]} hang in peer-to-peer copies and exchange without them "
            "(NCCL_P2P_DISABLE=1)"
        )


def _try(devices: Sequence[str]) -> dict[str, str]:
    first = exchange(devices, NCCL, environment=NCCL_ENVIRONMENT)
    if not first.failure:
        return {}
    again = exchange(devices, NCCL, environment={**NCCL_ENVIRONMENT, **NO_PEER_TO_PEER})
    if not again.failure:
        return dict(NO_PEER_TO_PEER)
    raise TransportError(
        f"GPUs {devices[0]} and {devices[1]} could not exchange {PROBE_BYTES >> 20} MB in "
        f"{LIMIT_S} s (IOMMU or ACS in the BIOS, or a /dev/shm of 64 MB in docker): "
        f"{again.failure}"
    )


def _key(devices: Sequence[str]) -> str:
    """The same as long as the two GPUs, their driver and NCCL are."""
    names = [torch.cuda.get_device_name(torch.device(device)) for device in devices]
    versions = (torch.cuda.nccl.version(), torch.version.cuda, _driver())
    return " | ".join(map(str, (*devices, *names, *versions)))


def _driver() -> str:
    """NVIDIA's driver version; empty where the kernel does not tell."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else ""
