"""Which kernels are right on this GPU and which is fastest, on the model's own layers.

Runs once per load and precision, some milliseconds. A kernel of another package is used only if
its values are those of `reference` and equal calls give equal bits.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..registry import eligible
from .casts import segment_in
from .engine import OPTIONAL, Engine, failure, is_fatal, refusal, request_of
from .errors import BackendError
from .kernels import Kernel, Reference
from .kernels.kitchen import release_workspaces
from .kernels.kitchen_access import is_direct
from .weight import PARTS, QuantWeight, Segment

log = logging.getLogger("slipstream")
NEEDED_BYTES = 2**30  # the layer in 16 bits, its input and output, and each kernel's own copies
NUM_ROWS = 4096  # tokens of a 1024 x 1024 image
NUM_CHECK_ROWS = {"int4": 300, "nvfp4": 300, "awq": 2}  # 300: the kernels pad to 512
NUM_EQUAL = 3
# Against `reference`: other accumulation orders flip codes (0.03), nvfp4 kernels scale per tensor
# as well; a wrong layout, scale or low-rank branch costs much more.
MAX_ERROR = {"int4": 0.08, "nvfp4": 0.15, "awq": 0.02}
MAX_UNROUNDED = 0.3  # of dequant, which does not round its inputs: 0.1 to 0.15
UNCHECKED = "not checked yet: no GPU memory was left for it"
_REPEATS = 5

Samples = Mapping[str, QuantWeight]
Seconds = Callable[[Callable[[], torch.Tensor]], float]


def prove(
    samples: Samples,
    device: torch.device,
    engine: Engine,
    make_room: Callable[[int, torch.device], object],
) -> None:
    """Checks the kernels that may run on a GPU and, for auto, orders them by speed.

    samples: precision -> a weight of the model; make_room: asks ComfyUI for that many free bytes,
    since another model may fill the GPU. What finds no memory is tried again at each run's start.
    Raises BackendError if a backend that was asked for is wrong here.
    """
    if device.type != "cuda" or engine.backend in ("dequant", "reference"):
        return
    make_room(NEEDED_BYTES, device)
    left = {}
    for precision, weight in samples.items():
        if engine.failed.get(("kitchen", precision)) == UNCHECKED:
            del engine.failed["kitchen", precision]
            engine.reasons.pop("kitchen", None)
        try:
            _prove(precision, weight, device, engine)
        except torch.cuda.OutOfMemoryError:
            log.warning("SVDQuant kernels are not checked yet: no GPU memory is left for it")
            left[precision] = weight
            if is_direct(device):  # ComfyUI has switched it off: nothing vouches for it
                engine.failed["kitchen", precision] = UNCHECKED
        finally:
            release_workspaces()
    engine.measure_later = None
    if left:
        engine.measure_later = lambda: prove(left, device, engine, lambda *_: None)


def _prove(precision: str, weight: QuantWeight, device: torch.device, engine: Engine) -> None:
    first = _moved(weight.segments[0], device)
    segment = segment_in(first, engine.compute or first.dtype)
    candidates = [k for k in engine.kernels if k.id != "reference"]
    if engine.backend != "auto":
        candidates = [k for k in engine.kernels if k.id == engine.backend]
    usable, reasons = eligible(candidates, request_of(segment, device))
    if not any(kernel.id in OPTIONAL for kernel in usable):
        usable = []  # nothing to compare: dequant takes every layer
    right = checked(usable, segment, engine)
    failed = engine.failed.get((engine.backend, precision))
    if failed is not None and precision != "awq":
        raise BackendError(refusal(engine.backend, failed))
    if engine.backend != "auto" or precision == "awq":
        return
    if "kitchen" in reasons:
        engine.note("kitchen", reasons["kitchen"])
    if not right:
        return
    x = torch.randn(NUM_ROWS, segment.facts.num_columns, device=device, dtype=segment.dtype)
    engine.measured(precision, fastest(right, x, segment, engine.reasons, _cuda_seconds))


def checked(kernels: list[Kernel], segment: Segment, engine: Engine) -> list[Kernel]:
    """Those that are right on `segment`; what is wrong with the others goes to the engine."""
    right = []
    for kernel in kernels:
        reason = fault(kernel, segment)
        if reason is None:
            right.append(kernel)
        else:
            engine.fail(kernel.id, segment.facts.precision, reason)
    return right


def fault(kernel: Kernel, segment: Segment) -> str | None:
    """What is wrong with a kernel on a segment: an exception, its values, or bits that differ
    between equal calls; of a 4-bit kernel also with shifted inputs. None if nothing.

    Raises what `is_fatal` means: it says nothing about the kernel.
    """
    variants = [segment]
    if segment.facts.precision == "int4" and kernel.id == "kitchen":
        facts = replace(segment.facts, unsigned=not segment.facts.unsigned)
        variants.append(replace(segment, facts=facts))
    reasons = (_fault(kernel, variant) for variant in variants)
    return next((reason for reason in reasons if reason is not None), None)


def _fault(kernel: Kernel, segment: Segment) -> str | None:
    precision, device = segment.facts.precision, segment.q.device
    shape = (NUM_CHECK_ROWS[precision], segment.facts.num_columns)
    x = torch.randn(shape, device=device, dtype=segment.dtype)
    if segment.facts.unsigned:
        x = x.abs_()  # what follows a GELU
    wanted = Reference().run(x, segment)  # kept: its memory must not become the kernel's output
    _spoil(wanted)
    limit = MAX_ERROR[precision] if kernel.id in OPTIONAL else MAX_UNROUNDED
    first: torch.Tensor | None = None
    for _ in range(NUM_EQUAL):
        try:
            got = kernel.run(x, segment)
        except Exception as error:
            if is_fatal(error):
                raise
            return failure(error)
        if first is None:
            error_ = float((got.float() - wanted.float()).norm() / wanted.float().norm())
            if not error_ < limit:
                return f"its result on this device is wrong (relative error {error_:.2f})"
            first = got
        elif not torch.equal(got, first):
            return "equal calls give different results on this device"
    return None


def _spoil(like: torch.Tensor) -> None:
    """Fills memory that the next outputs may get: a kernel that writes nothing must not pass."""
    for num_rows in (like.shape[0], -(-like.shape[0] // 256) * 256):
        like.new_full((num_rows, like.shape[1]), float("nan"))


def fastest(
    kernels: list[Kernel],
    x: torch.Tensor,
    segment: Segment,
    reasons: dict[str, str],
    seconds: Seconds,
) -> tuple[str, ...]:
    """Ids of `kernels` by speed on x; one that fails goes to `reasons` instead."""
    times: dict[str, float] = {}
    for kernel in kernels:
        try:
            times[kernel.id] = seconds(lambda kernel=kernel: kernel.run(x, segment))  # type: ignore[misc]
        except Exception as error:
            if is_fatal(error):
                raise
            reasons[kernel.id] = failure(error)
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
