"""What sequence parallel finds on this machine: devices, links, backend, and what it would refuse.

    ./run --doctor      or, with ComfyUI's Python,      python bench doctor

Starts pairs of short-lived processes that exchange over the links; changes nothing.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..backends.architectures.plans import PLANS, REFUSED
from ..parallel.comm import GLOO, NCCL
from ..parallel.config import SequenceParallelConfig, choose_devices
from ..parallel.probe import exchange
from .environment import environment
from .setup_env import find_comfyui

_PROBE_BYTES = 32 << 20
_TIMEOUT_S = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    for title, lines in (
        ("Versions", versions()),
        ("Devices", devices()),
        ("Links", links()),
        ("Sequence parallel would", choices()),
        ("Refused or slow", problems()),
        ("Models with a token plan", plans()),
    ):
        print(f"{title}")
        for line in lines:
            print(f"  {line}", flush=True)
    return 0


def versions() -> list[str]:
    found = environment(comfyui=find_comfyui())
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "-"
    comfyui = found.get("comfyui", "not found: set COMFYUI_PATH to a ComfyUI checkout")
    return [
        f"Python {found['python']}, torch {found['torch']}, CUDA {torch.version.cuda or '-'}, "
        f"NCCL {nccl}, {found['system']}",
        f"ComfyUI {comfyui}",
    ]


def gpu_names() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def devices() -> list[str]:
    """Every device that torch sees."""
    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"]
    for index, name in enumerate(gpu_names()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        lines.append(
            f"cuda:{index}: {name}, compute capability {capability}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return lines if len(lines) > 1 else [*lines, "no GPU"]


def links() -> list[str]:
    """Peer access and copy speed between GPUs (unverified: needs two), and loopback speed."""
    lines = []
    count = len(gpu_names())
    for a in range(count):
        for b in range(count):
            if a != b:
                peer = "peer access" if torch.cuda.can_device_access_peer(a, b) else "through host"
                lines.append(f"cuda:{a} -> cuda:{b}: {peer}, {copy_rate(a, b) / 1e9:.1f} GB/s")
    if dist.is_nccl_available() and os.name != "nt":
        for a, b in itertools.combinations(range(count), 2):
            pair = (f"cuda:{a}", f"cuda:{b}")
            lines.append(f"NCCL between {' and '.join(pair)}: {measured(pair, NCCL)}")
    lines.append(f"gloo between two processes: {measured(('cpu', 'cpu'), GLOO)}")
    return lines


def measured(pair: Sequence[str], backend: str) -> str:
    """What two processes on these devices really exchange, or why they cannot."""
    found = exchange(pair, backend, num_bytes=_PROBE_BYTES, limit_s=_TIMEOUT_S)
    if found.bytes_per_s is None:
        return f"no exchange in {_TIMEOUT_S} s ({found.failure})"
    return f"{found.bytes_per_s / 1e9:.2f} GB/s"


def copy_rate(source: int, target: int) -> float:
    """Bytes per second of one large copy from GPU to GPU."""
    data = torch.empty(256 << 20, dtype=torch.uint8, device=f"cuda:{source}")
    out = torch.empty_like(data, device=f"cuda:{target}")
    out.copy_(data)
    torch.cuda.synchronize(target)
    started = time.perf_counter()
    out.copy_(data)
    torch.cuda.synchronize(target)
    return data.nbytes / (time.perf_counter() - started)


def choices() -> list[str]:
    """What the node's automatic settings come to here."""
    names = gpu_names()
    if not names:
        return [
            "workers 0: run on one device, as without the node (there is no GPU)",
            "devices cpu,cpu: share a step between two CPU processes over gloo, to try it out",
        ]
    found = [f"cuda:{i}" for i in range(len(names))]
    alike = [f"cuda:{i}" for i, name in enumerate(names) if name == names[0]]
    chosen = choose_devices(SequenceParallelConfig(), found=found, alike=alike, own="cuda:0")
    backend = NCCL if dist.is_nccl_available() and os.name != "nt" else GLOO
    lines = [f"workers 0: {len(chosen)} processes on {', '.join(chosen)}, backend {backend}"]
    if backend == GLOO:
        lines.append("gloo copies every exchange through the host: expect it to be slow")
    return lines


def problems() -> list[str]:
    """Settings and hardware that sequence parallel would refuse, leave out or suffer from."""
    names, found = gpu_names(), []
    for index, name in enumerate(names):
        if name != names[0]:
            found.append(
                f"cuda:{index} is a {name}, not a {names[0]}: left out by workers 0, because the "
                "slowest GPU sets the pace. Name it in devices to use it."
            )
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "cudaMallocAsync" in allocator:
        found.append(
            "PYTORCH_CUDA_ALLOC_CONF asks for cudaMallocAsync: workers do not take it over"
        )
    if len(names) > 1 and "lo" not in os.environ.get("NCCL_SOCKET_IFNAME", "").split(","):
        found.append(
            "NCCL_SOCKET_IFNAME is not lo: NCCL is unauthenticated and may listen on the network. "
            "Start ComfyUI with NCCL_SOCKET_IFNAME=lo."
        )
    if not os.access(tempfile.gettempdir(), os.W_OK):
        found.append(
            f"{tempfile.gettempdir()} is not writable: workers need a private folder there"
        )
    if sys.platform == "win32":
        found.append("Windows: NCCL does not exist, so GPUs exchange through gloo and the host")
    return found or ["nothing"]


def plans() -> list[str]:
    known = ", ".join(sorted(PLANS))
    return [known, *(f"{name}: refused, {why}" for name, why in sorted(REFUSED.items()))]
