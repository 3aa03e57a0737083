"""Which kernel is fastest on this GPU, measured on one of the model's own layers.

Runs once per load and precision, some milliseconds. A kernel whose result is not near that of the
16-bit matmul is left out, whatever its speed.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..registry import eligible
from .engine import Engine, request_of
from .kernels import Kernel
from .weight import PARTS, QuantWeight, Segment

log = logging.getLogger("slipstream")
NEEDED_BYTES = 2**30  # the layer in 16 bits, its input and output, and each kernel's own copies
NUM_ROWS = 4096  # tokens of a 1024 x 1024 image
MAX_ERROR = 0.3  # 4-bit inputs alone cost 0.1 to 0.15
_REPEATS = 5


def measured_order(
    samples: Mapping[str, QuantWeight],
    device: torch.device,
    engine: Engine,
    make_room: Callable[[int, torch.device], object],
) -> dict[str, tuple[str, ...]]:
    """Precision -> kernel ids, fastest first; empty without a GPU (nothing is measured).

    make_room: asks ComfyUI for that many free bytes, since another model may fill the GPU.
    """
    if device.type != "cuda":
        return {}
    order = {}
    for precision, weight in samples.items():
        if precision == "awq":
            continue
        make_room(NEEDED_BYTES, device)
        try:
            segment = _moved(weight.segments[0], device)
            columns = segment.facts.num_columns
            x = torch.randn(NUM_ROWS, columns, device=device, dtype=segment.dtype)
            candidates = [kernel for kernel in engine.kernels if kernel.id != "reference"]
            usable, _ = eligible(candidates, request_of(segment, device))
            order[precision] = fastest(usable, x, segment, engine.reasons, _cuda_seconds)
        except torch.cuda.OutOfMemoryError:
            log.warning("SVDQuant kernels are not measured: no GPU memory is left for it")
    return order


def fastest(
    kernels: list[Kernel],
    x: torch.Tensor,
    segment: Segment,
    reasons: dict[str, str],
    seconds: Callable[[Callable[[], torch.Tensor]], float],
) -> tuple[str, ...]:
    """Ids of `kernels` by speed on x; one that fails or is wrong goes to `reasons` instead."""
    wanted = next(k for k in kernels if k.id == "dequant").run(x, segment)
    times: dict[str, float] = {}
    for kernel in kernels:
        try:
            got = kernel.run(x, segment)
        except torch.cuda.OutOfMemoryError:  # says nothing about the kernel: it may serve later
            log.warning("SVDQuant %s is not measured: no GPU memory is left for it", kernel.id)
            continue
        except Exception as error:  # noqa: BLE001 - an optional package raises anything
            reasons[kernel.id] = f"failed on this GPU: {type(error).__name__}: {error}"
            continue
        error_ = float((got.float() - wanted.float()).norm() / wanted.float().norm())
        if not error_ < MAX_ERROR:
            reasons[kernel.id] = f"its result on this GPU is wrong (relative error {error_:.2f})"
            continue
        times[kernel.id] = seconds(lambda kernel=kernel: kernel.run(x, segment))  # type: ignore[misc]
    order = tuple(sorted(times, key=lambda name: times[name]))
    shown = ", ".join(f"{name} {times[name] * 1e3:.2f} ms" for name in order)
    shape = f"{x.shape[0]} x {segment.facts.num_columns} x {segment.facts.num_rows}"
    log.info("SVDQuant measured %s at %s: %s", segment.facts.precision, shape, shown)
    for name in order[1:]:
        reasons[name] = f"slower here ({shown} at {shape})"
    return order


def _moved(segment: Segment, device: torch.device) -> Segment:
    parts = {name: getattr(segment, name) for name in PARTS}
    return replace(segment, **{n: t.to(device) for n, t in parts.items() if t is not None})


def _cuda_seconds(call: Callable[[], torch.Tensor]) -> float:
    """Seconds of one call, the best of a few, with the device idle before and after."""
    best = float("inf")
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
