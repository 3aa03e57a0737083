"""Backends: impostors and broken packages, choosing by measurement, what Inspect says."""

import sys
import types

import pytest
import svdquant_models
import torch
from slipstream.backends.registry import reason_against
from slipstream.backends.svdquant import kernels, measure
from slipstream.backends.svdquant.casts import narrowed
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.engine import Engine
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.inspection import inspect_text, requests, verdict
from slipstream.backends.svdquant.kernels import Dequant, Kitchen, Nunchaku, Reference
from slipstream.backends.svdquant.kernels.base import LayerRequest
from slipstream.backends.svdquant.measure import fastest
from slipstream.backends.svdquant.quantize import quantise
from slipstream.backends.svdquant.segments import unsigned_by_topology
from slipstream.backends.svdquant.technique import Loaded, SVDQuantState
from slipstream.backends.svdquant.weight import Facts, Segment

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder for fake packages, in front of everything that is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    assert "nunchaku" not in sys.modules
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "nunchaku"]:
        del sys.modules[name]


def package(folder, name, text, extra=()):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    for file in extra:
        (folder / name / file).write_text("")


def test_pypis_nunchaku_is_recognised_and_not_imported(packages):
    package(packages, "nunchaku", "raise RuntimeError('imported')", ("stats.py",))
    reason = Nunchaku().available()
    assert reason is not None
    assert "unrelated PyPI package (no nunchaku._C.ops)" in reason
    assert "nunchaku" not in sys.modules


@pytest.mark.parametrize("error", ["OSError", "TypeError"])
def test_a_broken_nunchaku_is_a_reason(packages, error):
    package(packages, "nunchaku", f"raise {error}('not for this torch')", ("_C.abi3.so",))
    assert "nunchaku cannot be imported (not for this torch)" in Nunchaku().available()


def test_no_nunchaku(packages, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Nunchaku().available().startswith("nunchaku is not installed")


def test_an_old_comfy_kitchen_is_named(monkeypatch):
    old = types.ModuleType("comfy_kitchen")
    old.__version__ = "0.1.9"
    monkeypatch.setitem(sys.modules, "comfy_kitchen", old)
    assert "comfy-kitchen 0.1.9 lacks quantize_svdquant_w4a4" in Kitchen().available()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert "comfy-kitchen cannot be imported" in Kitchen().available()
    for precision in ("int4", "nvfp4"):  # its rules on a layer ask the package, too
        layer = LayerRequest(
            precision=precision, device_type="cuda", dtype="bfloat16", num_rows=64, num_columns=64,
            capability=(12, 0),
        )  # fmt: skip
        assert "comfy-kitchen cannot be imported" in reason_against(Kitchen(), layer)


class Fake:
    """A kernel with a given result and, by `order`, a given speed."""

    def __init__(self, name, result=None, error=None):
        self.id, self.result, self.error = name, result, error

    def available(self):
        return None

    def ineligible(self, request):
        return None

    def run(self, x, segment, *, bias=None, extra=None, share=None):
        if self.error is not None:
            raise self.error
        return self.result(Dequant().run(x, segment)) if self.result else Dequant().run(x, segment)


def segment():
    q = quantise(torch.randn(128, 128) * 0.05, rank=16)
    from slipstream.backends.svdquant.layouts import plain_from_codes

    facts = Facts("int4", 0, 128, 0, 128)
    scale = q.codes.scale.t().contiguous()
    return Segment(facts, plain_from_codes(q.codes.codes), scale, q.smooth, q.down, q.up)


def test_the_fastest_right_kernel_is_taken():
    one = segment()
    x = torch.randn(8, 128).bfloat16()
    fakes = [
        Fake("kitchen"),
        Fake("dequant"),
        Fake("wrong", result=lambda y: y * 2),
        Fake("nan", result=lambda y: y * float("nan")),
        Fake("broken", error=RuntimeError("no kernel image")),
    ]
    speeds = iter([3.0, 2.0])  # kitchen, dequant; the others are never timed
    reasons = {}
    assert fastest(fakes, x, one, reasons, lambda call: next(speeds)) == ("dequant", "kitchen")
    assert "slower here" in reasons["kitchen"]
    assert "relative error 1.00" in reasons["wrong"]
    assert "wrong" in reasons["nan"]
    assert reasons["broken"] == "failed on this GPU: RuntimeError: no kernel image"
    engine = Engine("auto", order={"int4": ("dequant", "kitchen")})
    assert engine.kernel(one, x).id == "dequant"


@pytest.mark.parametrize("error", [ImportError("late"), TypeError("x"), AssertionError()])
def test_whatever_an_optional_package_raises_is_a_reason(error):
    fakes = [Fake("nunchaku", error=error), Fake("dequant")]
    reasons = {}
    x = torch.randn(8, 128).bfloat16()
    assert fastest(fakes, x, segment(), reasons, lambda call: 1.0) == ("dequant",)
    assert reasons["nunchaku"].startswith(f"failed on this GPU: {type(error).__name__}")


def test_out_of_memory_while_measuring_brands_no_kernel():
    fakes = [Fake("kitchen", error=torch.cuda.OutOfMemoryError("full")), Fake("dequant")]
    reasons = {}
    x = torch.randn(8, 128).bfloat16()
    assert fastest(fakes, x, segment(), reasons, lambda call: 1.0) == ("dequant",)
    assert reasons == {}


def test_measuring_asks_comfyui_for_room_and_can_do_without(monkeypatch):
    asked = []
    weight = types.SimpleNamespace(segments=(segment(),))
    monkeypatch.setattr(measure, "_moved", full)
    order = measure.measured_order(
        {"int4": weight}, torch.device("cuda"), Engine(), lambda *wanted: asked.append(wanted)
    )
    assert order == {}
    assert asked == [(measure.NEEDED_BYTES, torch.device("cuda"))]


def full(*args):
    raise torch.cuda.OutOfMemoryError("full")


def test_workspaces_of_comfy_kitchen_end_with_the_run(monkeypatch):
    """It keeps one per token count for ever: 84 MB for each size of picture."""
    cuda = types.ModuleType("comfy_kitchen.backends.cuda")
    cuda._SVDQUANT_WORKSPACE_CACHE = {size: torch.zeros(8) for size in range(12)}
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    loaded = Loaded(title="t", family="flux", dialect="d", weight_bytes=1, keys=())
    run = types.SimpleNamespace(patcher=types.SimpleNamespace(patches={}))
    state = SVDQuantState(run, loaded, Engine())
    assert len(cuda._SVDQUANT_WORKSPACE_CACHE) == 12
    state.close()
    assert cuda._SVDQUANT_WORKSPACE_CACHE == {}


def test_the_real_comfy_kitchen_keeps_its_workspaces_where_we_look():
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends import cuda

    assert isinstance(cuda._SVDQUANT_WORKSPACE_CACHE, dict)


@pytest.mark.parametrize(
    ("precision", "capability", "missing"),
    [("int4", (8, 6), "scaled_mm_svdquant_w4a4"), ("nvfp4", (12, 0), "scaled_mm_nvfp4")],
)
def test_a_backend_without_the_kernel_is_not_taken_for_one_that_has_it(
    monkeypatch, precision, capability, missing
):
    """RDNA 2 registers hip without its matrix kernels; without cuBLASLt there is no nvfp4."""
    kitchen = pytest.importorskip("comfy_kitchen")
    ops = ["quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4", "quantize_nvfp4", "scaled_mm_nvfp4"]
    status = {"available": True, "disabled": False, "capabilities": ops}
    monkeypatch.setattr(kitchen, "list_backends", lambda: {"cuda": status})
    layer = LayerRequest(
        precision=precision, device_type="cuda", dtype="bfloat16", num_rows=64, num_columns=64,
        capability=capability,
    )  # fmt: skip
    assert Kitchen().ineligible(layer) is None
    ops.remove(missing)
    assert Kitchen().ineligible(layer) == (
        f"comfy-kitchen's cuda kernels on this GPU have no {missing}"
    )


def test_four_bit_kernels_pass_the_check():
    """The accuracy check must not refuse what it is for."""
    pytest.importorskip("comfy_kitchen")
    one, x, reasons = segment(), torch.randn(64, 128).bfloat16(), {}
    order = fastest([Kitchen(), Dequant(), Reference()], x, one, reasons, lambda call: 1.0)
    assert set(order) == {"kitchen", "dequant", "reference"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "svdq-fp4_r128-tiny.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", single=1)
    return detect(read_header(path))


def test_inspect_text(checkpoint):
    pytest.importorskip("comfy_kitchen")
    text = inspect_text(checkpoint, CPU)
    assert "svdq-fp4_r128-tiny.safetensors: 1.2 MB" in text
    assert "Family: FLUX.1. Dialect: Nunchaku (lora_down, smooth)." in text
    assert "Precision: int4, rank 32, 16-bit parts BF16." in text
    assert "Quantised layers: 15 (3 awq, 12 int4)" in text
    assert "Doubt: the file's name says nvfp4, rank 128." in text
    assert "kitchen: yes" in text
    assert "nunchaku: no (" in text
    assert "dequant: yes" in text
    assert "auto picks kitchen" in text


def test_verdicts_follow_the_device(checkpoint, monkeypatch):
    from dataclasses import replace

    from slipstream.backends.svdquant import inspection

    asked = requests(checkpoint, CPU)
    assert {r.unsigned for r in asked if r.precision == "int4"} == {True, False}

    def on(**changes):
        moved = [replace(r, device_type="cuda", **changes) for r in asked]
        monkeypatch.setattr(inspection, "requests", lambda *_: moved)

    monkeypatch.setattr(Nunchaku, "available", lambda self: None)
    on(capability=(9, 0))
    assert "no (nunchaku has no SM90 kernels" in verdict(Nunchaku(), checkpoint, CPU)
    on(capability=(8, 9))
    assert verdict(Nunchaku(), checkpoint, CPU).startswith("for ")
    on(capability=(7, 5))
    if Kitchen().available() is None:
        assert "SM75" in verdict(Kitchen(), checkpoint, CPU)
    assert verdict(Dequant(), checkpoint, CPU) == "yes"


def test_topology_of_unsigned_layers(checkpoint, tmp_path):
    unsigned = {n for n, flag in unsigned_by_topology(checkpoint).items() if flag}
    assert unsigned == {
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.0.mlp_fc2",
    }
    for family, dialect, precision, number in (
        ("qwen-image", "nunchaku-2", "int4", 2),
        ("qwen-image", "nunchaku-2", "nvfp4", 0),
        ("qwen-image", "nunchaku-lite", "int4", 0),
        ("qwen-image", "comfy-kitchen", "int4", 2),
        ("z-image", "nunchaku-2", "int4", 0),
    ):
        path = tmp_path / f"{family}{dialect}{precision}.safetensors"
        svdquant_models.write(path, family, dialect, precision=precision)
        flags = unsigned_by_topology(detect(read_header(path)))
        assert sum(flags.values()) == number, (family, dialect, precision)


def test_every_backend_has_one_id():
    assert [k.id for k in kernels.KERNELS] == ["kitchen", "nunchaku", "dequant", "reference"]


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_no_cast_to_fp16_makes_infinity_or_zero(source):
    """Real Z-Image files have biases beyond fp16, and scales of quiet groups below it."""
    values = torch.tensor([70_000.0, -1e30, 1e-9, -1e-12, 0.0, 1.5, -65_504.0], dtype=source)
    found = narrowed(values, torch.float16)
    assert found.dtype == torch.float16
    assert torch.isfinite(found).all()
    assert torch.equal(found == 0, values == 0)
    assert torch.equal(found.sign().float(), values.sign().float())
    assert found[5] == 1.5
    assert narrowed(values, torch.bfloat16).dtype == torch.bfloat16
