"""Questions of kernels_child.py about SVDQuant's use of comfy-kitchen, on a faked GPU."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import fake_cuda
import fake_kitchen
import torch

FACTS = {"int4": (256, 384), "awq": (768, 128)}


def on_gpu(weight: Any) -> Any:
    from slipstream.backends.svdquant.measure import _moved

    return _moved(weight, torch.device("cuda"))


def segment(precision: str) -> Any:
    """One with a low-rank branch and smoothing, bf16, on the CPU."""
    from slipstream.backends.svdquant.layouts import plain_from_codes
    from slipstream.backends.svdquant.quantize import quantise
    from slipstream.backends.svdquant.weight import Facts, Segment

    torch.manual_seed(0)
    num_rows, num_columns = FACTS[precision]
    facts = Facts(precision, 0, num_rows, 0, num_columns)
    if precision == "awq":
        codes = torch.randint(0, 16, (num_rows, num_columns), dtype=torch.int8)
        scale = (torch.rand(num_columns // 64, num_rows) * 0.02).bfloat16()
        return Segment(facts, plain_from_codes(codes), scale, zeros=scale * 0.3)
    q = quantise(torch.randn(num_rows, num_columns) * 0.05, rank=16)
    scale = q.codes.scale.t().contiguous()
    return Segment(facts, plain_from_codes(q.codes.codes), scale, q.smooth, q.down, q.up)


@functools.cache
def gpu(capability: tuple[int, int] = (8, 9)) -> None:
    """Once per process."""
    fake_cuda.start(capability)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    os.environ.update(values)
    yield
    for name in values:
        del os.environ[name]


def direct(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`one_engine` for each of some cases."""
    return [one_engine(**case) for case in cases]


def one_engine(
    fault: str = "",
    cuda: str = "12.8",
    driver: Sequence[int] | None = (13, 0),
    backend: str = "auto",
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What an engine does with one model of both precisions on such a machine."""
    gpu()
    compiled = fake_kitchen.install(fault, cuda, driver)
    with environment(env or {}):
        return _one_engine(compiled, backend)


def _one_engine(compiled: Any, backend: str) -> dict[str, Any]:
    from slipstream.backends.svdquant import measure
    from slipstream.backends.svdquant.engine import Engine
    from slipstream.backends.svdquant.errors import BackendError
    from slipstream.backends.svdquant.kernels import Reference
    from slipstream.backends.svdquant.notices import notices
    from slipstream.backends.svdquant.weight import whole

    measure.NUM_ROWS, measure._REPEATS = 64, 1
    device = torch.device("cuda")
    segments = {p: segment(p) for p in FACTS}
    samples = {p: whole(s) for p, s in segments.items()}
    engine = Engine(backend)
    try:
        measure.prove(samples, device, engine, lambda *_: None)
    except BackendError as error:
        return {"error": str(error)}
    checks = len(compiled.calls)
    found: dict[str, Any] = {"ran": {}, "errors": {}}
    for precision, one in segments.items():
        moved = on_gpu(one)
        x = torch.randn(3, one.facts.num_columns, dtype=torch.bfloat16).to(device)
        kernel = engine.kernel(moved, x)
        y, wanted = kernel.run(x, moved), Reference().run(x, moved)
        found["ran"][precision] = kernel.id
        found["errors"][precision] = float(
            (y.float() - wanted.float()).norm() / wanted.float().norm()
        )
    return {
        **found,
        "measured": sorted(engine.order.get("int4", ())),
        "reasons": engine.reasons,
        "notices": notices(engine, samples, device, "FLUX.1"),
        "checks": checks,
        "calls": compiled.calls[checks:],
        "workspaces": fake_cuda.Memory.held,
    }


def same_rule(cases: list[dict[str, Any]]) -> list[list[bool]]:
    """[ours, comfy-kitchen's layout] for environments: whether functions are called directly."""
    gpu()
    fake_kitchen.install()
    import comfy_kitchen
    from comfy_kitchen.tensor import svdquant_w4a4 as layout
    from slipstream.backends.svdquant.kernels.kitchen_access import is_direct

    device = torch.device("cuda")
    x = torch.zeros(1, device=device)
    found = []
    for case in cases:
        layout.cuda_backend._EXT_AVAILABLE = case.get("extension", True)
        override = case.get("override")
        chosen = comfy_kitchen.use_backend(override) if override else nullcontext()
        with environment(case.get("env", {})), chosen:
            found.append([is_direct(device), layout._direct_cuda_backend(x, x) is not None])
    return found


def workspaces(num_sizes: int) -> list[int]:
    """Bytes on the device before, with a workspace for each of some sizes, and after a run."""
    gpu()
    fake_kitchen.install()
    from types import SimpleNamespace

    from slipstream.backends.svdquant.engine import Engine
    from slipstream.backends.svdquant.kernels import Kitchen
    from slipstream.backends.svdquant.technique import Loaded, SVDQuantState

    one = on_gpu(segment("int4"))
    loaded = Loaded(title="t", family="flux", dialect="d", weight_bytes=1, keys=())
    run = SimpleNamespace(patcher=SimpleNamespace(patches={}))
    state = SVDQuantState(run, loaded, Engine())
    found = [fake_cuda.Memory.held]
    for size in range(num_sizes):
        x = torch.zeros(256 * (size + 1), 384, dtype=torch.bfloat16, device="cuda")
        Kitchen().run(x, one)
        del x
    found.append(fake_cuda.Memory.held)
    state.close()
    return [*found, fake_cuda.Memory.held]


def split_rows(limit: int) -> dict[str, Any]:
    """Sizes of the calls for 1,000 rows where indices reach only to `limit`, and the error."""
    gpu()
    compiled = fake_kitchen.install()
    from slipstream.backends.svdquant.kernels import Kitchen, kitchen

    one = on_gpu(segment("int4"))
    x = torch.randn(1000, 384, dtype=torch.bfloat16).to("cuda")
    whole = Kitchen().run(x, one)
    compiled.calls.clear()
    kitchen._MAX_ELEMENTS = fake_kitchen.LIMIT = limit
    parts = Kitchen().run(x, one)
    rows = [call["x"][0] for call in compiled.calls if call["name"] == "quantize"]
    return {
        "rows": rows,
        "equal": bool(torch.equal(whole, parts)),
        "largest": kitchen.max_rows(one),
    }
